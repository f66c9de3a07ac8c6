"""The step that measures batch statistics: of one batch alone, without dropout. Pools no batches."""

from collections.abc import Mapping
from typing import Any

import jax

from trainkit._core.state import TrainState, key_of, with_typed_key
from trainkit._core.typing import Batch
from trainkit._models.model import Model
from trainkit._step.forward import Forward, UserFunctions
from trainkit._step.given import Constants, Given
from trainkit.parallel._strategy import Strategy

Measured = dict[str, dict[str, jax.Array]]
"""`mean` and `var` of each layer, by its path with slashes."""


class MeasuringStep:
    """One training pass forward, of which the batch statistics alone are kept.

    Args:
        model: of the trainer.
        strategy: of the trainer.
        user: its functions.
        constants: what it gives its steps beside state and batch.
    """

    def __init__(self, model: Model, strategy: Strategy, user: UserFunctions, constants: Constants) -> None:
        measuring, self._found = model.measuring()
        self._strategy = strategy
        self._forward, self._constants = Forward(measuring, strategy, user, False, constants), constants

    def __call__(
        self, impl: str, given: Given | None, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> Measured:
        """Returns what was measured; nothing where no layer takes statistics of the batch.

        Args:
            impl: of the key in `state`.
            given: beside state and batch.
            state: its key is raw.
            batch: leaves `[batch, ...]`.
            mask: `bool[batch]`, None when every row is real.
        """
        state = with_typed_key(state, impl)
        key = jax.random.fold_in(key_of(state), state.step)
        with self._constants.traced(given):
            _, _, updated = self._forward.losses(state.variables, batch, mask, state.step, key, train=True)
        layers = {"/".join(path): _at(updated["batch_stats"], path) for path in sorted(self._found)}
        return self._strategy.merge_collections(
            {name: {"mean": layer["mean"], "var": layer["var"]} for name, layer in layers.items()}
        )


def _at(tree: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    for part in path:
        tree = tree[part]
    return tree
