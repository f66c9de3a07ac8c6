"""What a trainer answers at any moment, also in the middle of a fit: its state, evaluations, predictions.

Owns no state: that is the run's.
"""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, final

import jax

from trainkit._core.history import History
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch, PyTree
from trainkit._loop.questions import Questions
from trainkit._loop.run import Run
from trainkit._step.given import Constants
from trainkit._trainer.overridable import Overridable

_NO_STATE = "there is no state yet: call trainer.init(batch) or trainer.fit(...) first."


class Asking(Overridable):
    """The questions of a trainer."""

    _run: Run
    _constants: Constants
    _hparams: Mapping[str, Any]

    @final
    @property
    def frozen(self) -> Mapping[str, PyTree]:
        """The arrays of `Trainer(frozen=)`, by name; in a `train_step` or `eval_step` of your own those of the step.

        Set it to go on with other arrays of the same structure, shapes and dtypes; nothing compiles again.

        Raises:
            RuntimeError: it is set while `fit` runs.
            TypeError: it is set to no mapping of names to trees of arrays.
            ValueError: the structure, a shape or a dtype is another than before; names the path.
        """
        return MappingProxyType(dict(self._constants.now().frozen))

    @frozen.setter
    def frozen(self, frozen: Mapping[str, PyTree]) -> None:
        self._run.refuse_in_fit(
            "frozen = ...", "return tk.Stop(reason) from the hook, and set it after the fit"
        )
        self._constants.replace(frozen)

    @final
    @property
    def hparams(self) -> Mapping[str, Any]:
        """The values of `Trainer(hparams=)` as they were given; the numbers among them are `ctx.hparams`."""
        return self._hparams

    @final
    @property
    def state(self) -> TrainState:
        """The current train state; set it to continue from another one, e.g. one with loaded weights.

        In a hook of a callback it is that of the moment: a copy, which no later step takes and which costs one;
        `info.state` costs nothing and is valid during the call.

        Raises:
            RuntimeError: there is none before `init` or the first `fit`; or it is set while `fit` runs.
            TypeError: it is set to something else than a `TrainState`.
        """
        state = self._run.show()
        if state is None:
            raise RuntimeError(_NO_STATE)
        return state

    @state.setter
    def state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise TypeError(f"trainer.state must be a tk.TrainState, got {type(state).__name__}.")
        self._run.refuse_in_fit(
            "state = ...", "return tk.Update(lambda state: state.replace(...)) from the hook instead"
        )
        self._run.become(state, shown=True)

    @final
    @property
    def history(self) -> History:
        """Every scalar logged so far, over all fits; also after one that raised."""
        return self._run.history

    @final
    def evaluate(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Returns the metrics over one pass of `data`, exact: each example counted once.

        In a hook of a callback it looks at the state of that moment, as `predict` and `apply` do.

        Args:
            data: as for `fit`; or a mapping of names to sources, which gives `<name>/<metric>`.
            weights: "averaged" (or "ema") for those of the first view that a callback gives (`EMA`, `SWA`, `EvalView`),
                where there is one; "live" for the current ones; or the name of a view.
            limit: int >= 1, batches at most; None for all.

        Returns:
            Floats by name, NumPy arrays for metrics that are not scalars.

        Raises:
            RuntimeError: there is no state yet, or `fit` runs in another thread.
            ValueError: no view has the name `weights`; the message lists those there are.
        """
        return self._asked("evaluate").evaluate(data, weights=weights, limit=limit)

    @final
    def predict(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
        out: str | os.PathLike[str] | None = None,
    ) -> PyTree:
        """Returns what `predict_step` gives for each example of `data`, in order, as NumPy arrays.

        With `out` they may be larger than memory: each leaf is written to a `.npy` file named by its path
        (`output.npy` where there is one array) as the batches come, and returned as a memory map that can't be written
        to. Broken off and called again with the same folder, it goes on after the last batch that is whole there, and
        what is complete is not computed again; predictions of other weights, another program or other data in the
        folder are replaced. A file has its name when all rows are in it.

        Args:
            data: as for `fit`.
            weights: as for `evaluate`.
            limit: as for `evaluate`.
            out: folder for the predictions, made where it is missing; None keeps them in memory.

        Raises:
            RuntimeError: as for `evaluate`.
            ValueError: as for `evaluate`; or `out` holds files of the same names that `predict` did not write, there
                are several processes, or a batch is one unit.
            TypeError: with `out`, a leaf that stays on the host holds objects other than strings.
        """
        return self._asked("predict").predict(data, weights=weights, limit=limit, out=out)

    @final
    def apply(
        self,
        fn: Callable[..., Any],
        *args: Any,
        weights: str = "averaged",
        rng: jax.Array | int | None = None,
    ) -> PyTree:
        """Returns what `fn(model, *args)` gives, on the devices; compiled once, and kept by `fn`.

        It runs in the scope of the bound module as `loss` does, but not training: what it changes is dropped.

        Args:
            fn: e.g. `lambda model, z: model.decode(z)`; define it once, not anew for each call. One with a parameter
                named `ctx` is given the `StepContext` by that name.
            *args: trees of arrays and numbers.
            weights: as for `evaluate`.
            rng: a key or an int, of all streams of the module; by default that of the step.

        Raises:
            RuntimeError: as for `evaluate`.
            TypeError: `fn` is no function, or `args` hold something else.
        """
        return self._asked("apply").apply(fn, *args, weights=weights, rng=rng)

    @final
    def module(self, weights: str = "averaged") -> Any:
        """Returns the trained module for people to call, not training: its arrays are copies.

        Args:
            weights: as for `evaluate`.

        Returns:
            For `flax.nnx` the module in `eval()` mode, whose key streams are those of the next step; for `flax.linen`
            the bound module.

        Raises:
            RuntimeError: as for `evaluate`.
        """
        state = self._asked("module").weighted(weights)
        return self._engine.module(state)

    @final
    def _exportable(self, weights: str) -> tuple[Callable[[PyTree, Batch], PyTree], PyTree]:
        """What `tk.export` takes: a pure function of `(arrays, batch)` that predicts, and its arrays."""
        return self._engine.prediction(self._asked("state").weighted(weights))

    def _current(self, what: str) -> TrainState:
        state = self._run.current(what)
        if state is None:
            raise RuntimeError(_NO_STATE)
        return state

    def _asked(self, what: str) -> Questions:
        state = self._current(what)
        return Questions(self._engine, lambda: state, self._run.timed)
