"""Precision policies: in which dtype parameters, computation and results are. Owns the casts, not where they happen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of a policy. Statistics, losses, gradients and metrics stay float32 under each.

    Attributes:
        param: of the parameters as they are kept and updated.
        compute: of parameters and inputs as the model sees them.
        output: of what a call of the model returns, so that a loss is computed in it.
        scaled: whether the loss is scaled against underflow, as float16 needs (Micikevicius et al. 2018).
    """

    param: str = "float32"
    compute: str = "float32"
    output: str = "float32"
    scaled: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether anything is cast at all."""
        return self.compute != self.param or self.output != self.compute

    def to_compute(self, tree: PyTree) -> PyTree:
        """Returns `tree` with its floats in the compute dtype."""
        return cast_floats(tree, self.compute) if self.is_mixed else tree

    def to_output(self, tree: PyTree) -> PyTree:
        """Returns `tree` with its floats in the output dtype."""
        return cast_floats(tree, self.output) if self.is_mixed else tree


_POLICIES = {
    "float32": Precision(),
    "bfloat16": Precision(compute="bfloat16"),
    "float16": Precision(compute="float16", scaled=True),
}


def resolve_precision(precision: str) -> Precision:
    """Returns the policy named `precision`.

    Raises:
        ValueError: there is none of that name.
    """
    if precision not in _POLICIES:
        raise ValueError(f"precision={precision!r}: the choices are {', '.join(map(repr, _POLICIES))}.")
    return _POLICIES[precision]


def cast_floats(tree: PyTree, dtype: str) -> PyTree:
    """Returns `tree` with every real floating leaf in `dtype`; others as they are."""

    def cast(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, dtype)

    return jax.tree.map(cast, tree)
