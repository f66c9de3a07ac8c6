"""Strategies: how one step runs on the devices at hand."""

from trainkit.parallel._mesh import Mesh
from trainkit.parallel._strategy import Strategy

__all__ = ["Mesh", "Strategy"]
