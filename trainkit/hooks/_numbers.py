"""Named numbers that a probe found, as one array. Knows no probe."""

from collections.abc import Mapping
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Numbers:
    """Named numbers in one array: each array more costs at every call, and again when it is read.

    Attributes:
        values: `float32[n]`.
        names: static.
    """

    values: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, found: Mapping[str, jax.Array]) -> Self:
        """Returns scalars by name as one array."""
        values = jnp.asarray(list(found.values()), jnp.float32)
        return cls(values, tuple(found))  # pyright: ignore[reportCallIssue]

    def read(self) -> dict[str, float]:
        """Returns the numbers by name; waits for the devices."""
        return dict(zip(self.names, np.asarray(self.values).tolist(), strict=True))
