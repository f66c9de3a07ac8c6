"""Strategies: how one step runs on the devices at hand.

Owns the division of a batch, the layout of the state and the reductions that make sums global. What a step computes is
`_step/`'s; no strategy knows a model or a metric.
"""

from trainkit.parallel._mesh import Mesh
from trainkit.parallel._per_example import PerExample
from trainkit.parallel._pmap import Pmap
from trainkit.parallel._strategy import Role, Strategy

__all__ = ["Mesh", "PerExample", "Pmap", "Role", "Strategy"]
