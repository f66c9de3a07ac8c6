"""Strategies: how one step runs on the devices at hand."""

from trainkit.parallel._mesh import Mesh
from trainkit.parallel._per_example import PerExample
from trainkit.parallel._pmap import Pmap
from trainkit.parallel._strategy import Role, Strategy

__all__ = ["Mesh", "PerExample", "Pmap", "Role", "Strategy"]
