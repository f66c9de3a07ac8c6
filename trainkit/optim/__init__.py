"""Optimizers beyond those of optax: groups of parameters. Owns no step, and no transformation of its own."""

from trainkit.optim._by_path import ByPath, by_path

__all__ = ["ByPath", "by_path"]
