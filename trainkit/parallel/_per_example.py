"""`PerExample`: the loss is written for one example, and mapped over the batch."""

from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np

from trainkit._core.tree import path_name
from trainkit._core.typing import Batch, Device, PyTree
from trainkit.parallel._spmd import Spmd
from trainkit.parallel._strategy import Forward


@final
class PerExample(Spmd):
    """`jax.vmap` of a loss that is written for ONE example, with the batch axis named.

    Each example has a key of its own. Collections that a layer changes must come out the same for every
    example, which layers reach by reducing over the axis (`nn.BatchNorm(axis_name="batch")`). The batch is
    divided over the devices.

    Args:
        axis_name: name of the batch axis.
        devices: the devices to use; all by default, those of other processes included.

    Example:
        >>> PerExample(devices=jax.local_devices()[:1]).axis_name
        'batch'
    """

    def __init__(self, *, axis_name: str = "batch", devices: Sequence[Device] | None = None) -> None:
        super().__init__(sizes={"data": None, "fsdp": 1, "tensor": 1}, devices=devices)
        self.axis_name = axis_name

    def example(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda leaf: leaf[0] if np.ndim(leaf) else leaf, batch)

    def map_forward(self, forward: Forward) -> Forward:
        def mapped(variables: Any, batch: Batch, mask: jax.Array, step: jax.Array, rng: jax.Array) -> Any:
            axes = jax.tree.map(lambda leaf: 0 if np.ndim(leaf) else None, batch)
            arguments = (variables, batch, mask, step, jax.random.split(rng, mask.shape[0]))

            def over_rows(collections: Any) -> Any:
                return jax.vmap(
                    forward,
                    in_axes=(None, axes, 0, None, 0),
                    out_axes=(0, 0, collections),
                    axis_name=self.axis_name,
                )(*arguments)

            try:
                return over_rows(None)
            except ValueError as error:
                if "out_axes is None" not in str(error):
                    raise
                # Closed over: what eval_shape is given it traces, and axes must stay Python numbers.
                names = _differing(
                    jax.eval_shape(lambda: over_rows(0))[2],
                    lambda axes: jax.eval_shape(lambda: over_rows(axes)),
                )
                raise ValueError(
                    f"{', '.join(names)} differ between the examples of a batch, so there is no one value to keep. "
                    f"Make the layer reduce over the batch, e.g. nn.BatchNorm(axis_name={self.axis_name!r}), or "
                    "use strategy='jit' with a loss written for the whole batch."
                ) from error

        return mapped

    def describe(self) -> str:
        return f"one example at a time, {super().describe()}"


def _differing(collections: PyTree, run: Any) -> list[str]:
    """Returns the paths in `collections` whose values differ between examples, found by running without each."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(collections)
    names = []
    for index, (path, _) in enumerate(paths):
        # None marks the one leaf under test as unmapped.
        axes = treedef.unflatten([None if other == index else 0 for other in range(len(paths))])
        try:
            run(axes)
        except ValueError:
            names.append(path_name(path))
    return names
