"""What a callback is told: typed, read-only, valid during the call. Owns nothing it shows."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import clu.metrics
import jax

from trainkit._core.history import History
from trainkit._core.layer import Layer
from trainkit._core.state import TrainState
from trainkit._core.typing import PyTree
from trainkit.writers._writer import MetricWriter


@dataclasses.dataclass(frozen=True)
class Plan:
    """How far a fit is going to run.

    Attributes:
        first_step: updates completed when this fit began.
        steps: step at which the fit ends, None while it is not known.
        epochs: epoch at which the fit ends, None when it was given in steps.
        steps_per_epoch: batches of one pass, None while it is not known.
        eval_names: names of the evaluation sources, e.g. `("eval",)`.
        dry_run: whether it only tries everything out: what is written outside of `info.logdir` stays unwritten.
        seed: of the run.
        batch_size: examples in a batch.
        hparams: what `Trainer(hparams=)` was given.
    """

    first_step: int = 0
    steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    eval_names: tuple[str, ...] = ()
    dry_run: bool = False
    seed: int = 0
    batch_size: int | None = None
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Asked(Protocol):
    """What answers the questions of a hook, for the state of the moment."""

    def evaluate(
        self, data: Any, *, weights: str, limit: int | None, metrics: type[clu.metrics.Collection] | None
    ) -> dict[str, Any]: ...

    def predict(
        self, data: Any, *, weights: str, limit: int | None, out: str | os.PathLike[str] | None
    ) -> PyTree: ...

    def apply(
        self, fn: Callable[..., Any], *args: Any, weights: str, rng: jax.Array | int | None
    ) -> PyTree: ...

    def layers(self) -> list[Layer]: ...


class Work(NamedTuple):
    """What the steps of a fit did so far.

    Attributes:
        steps: that were run, those that a callback went back on included.
        examples: real rows that they took, padding left out, of all processes.
    """

    steps: int = 0
    examples: int = 0


class Costs(Protocol):
    """What says what a fit has cost so far."""

    def timing(self) -> Mapping[str, float]: ...

    def work(self) -> Work: ...

    @property
    def step_flops(self) -> Callable[[], float | None]: ...


class Info:
    """What a hook of a callback is told. Read-only; `state` and the questions are valid during the call only.

    Args:
        state: returns the train state.
        metrics: returns the metrics of this moment.
        direction: says which way a metric improves.
        asked: answers questions about the state; None where nothing can.
        costs: says what the fit has cost so far; None where nothing can.

    Attributes:
        step: updates completed.
        epoch: passes over the training source begun; during epoch number 1 it is 1, before the first 0.
        history: every scalar logged so far.
        logdir: folder of the logs, None when the trainer has none.
        writer: where this callback writes; a `MetricWriter`.
        plan: how far the fit is going to run.
        seconds: since the fit began.
        probed: in `on_step`, what the `step_probe` of this callback gave for the step: arrays on the devices, which no
            later step takes. None without one.
    """

    step: int
    epoch: int
    history: History
    logdir: pathlib.Path | None
    writer: MetricWriter
    plan: Plan
    seconds: float
    probed: PyTree
    _state: Callable[[], TrainState] | None
    _metrics: Callable[[], Mapping[str, Any]]
    _direction: Callable[[str], str | None]
    _asked: Asked | None
    _costs: Costs | None

    def __init__(
        self,
        *,
        step: int,
        epoch: int,
        state: Callable[[], TrainState],
        metrics: Callable[[], Mapping[str, Any]],
        history: History,
        logdir: pathlib.Path | None,
        writer: MetricWriter,
        plan: Plan,
        seconds: float,
        direction: Callable[[str], str | None],
        asked: Asked | None = None,
        costs: Costs | None = None,
        probed: PyTree = None,
    ) -> None:
        # Past __setattr__, which refuses.
        self.__dict__.update(
            step=step,
            epoch=epoch,
            history=history,
            logdir=logdir,
            writer=writer,
            plan=plan,
            seconds=seconds,
            probed=probed,
            _state=state,
            _metrics=metrics,
            _direction=direction,
            _asked=asked,
            _costs=costs,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"info.{name} is read-only. To stop return tk.Stop(reason); to change the state return tk.Update(fn)."
        )

    @property
    def state(self) -> TrainState:
        """The train state, valid during the call: the next step takes its buffers.

        Raises:
            RuntimeError: the call is over.
        """
        if self._state is None:
            raise RuntimeError(
                "info.state is valid only during the hook it was given to, and not before the state exists. "
                "Read what you need during the call, e.g. jax.device_get(info.state.params)."
            )
        return self._state()

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics by full name, lazily: reading a value waits for the devices, holding the mapping does not.

        In `on_step`, `on_fit_end` and `on_exception` the `train/...` metrics over the steps since this
        callback last read this attribute in one of them; in `on_epoch_end` those over the pass; in
        `on_eval_end` the `<eval-name>/...` of this evaluation; else empty.
        """
        if "_read" not in self.__dict__:
            self.__dict__["_read"] = self._metrics()
        return self.__dict__["_read"]

    @property
    def timing(self) -> Mapping[str, float]:
        """Seconds of this fit so far by part, as `FitResult.timing` has them at its end; looks at the clock."""
        return {} if self._costs is None else self._costs.timing()

    @property
    def work(self) -> Work:
        """What the steps of this fit did so far."""
        return Work() if self._costs is None else self._costs.work()

    @property
    def step_flops(self) -> float | None:
        """Floating point operations of one training step on all devices, as XLA counts them before it optimises.

        Found at the first look, which lowers the step and compiles nothing; None where the strategy can't tell. A loop
        on the device (`nn.scan`, `nn.RNN`) counts as one round of it.
        """
        return None if self._costs is None else self._costs.step_flops()

    def direction(self, name: str) -> str | None:
        """Returns "min" or "max" where a registered metric says which is better under that name, else None."""
        return self._direction(name)

    def evaluate(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
        metrics: type[clu.metrics.Collection] | None = None,
    ) -> dict[str, Any]:
        """Returns the metrics of the state of this moment over one pass of `data`, as `Trainer.evaluate` does.

        Args:
            data: a source, or a mapping of names to sources, which gives `<name>/<metric>`.
            weights: "averaged" (or "ema") for those of the first view that a callback gives, where there is one; "live"
                for the current ones; or the name of a view.
            limit: int >= 1, batches at most; None for all.
            metrics: another collection than the trainer's, compiled at its first use; make it outside of the hook.

        Raises:
            RuntimeError: the call of the hook is over.
        """
        return self._answers("evaluate").evaluate(data, weights=weights, limit=limit, metrics=metrics)

    def predict(
        self,
        data: Any,
        *,
        weights: str = "averaged",
        limit: int | None = None,
        out: str | os.PathLike[str] | None = None,
    ) -> PyTree:
        """Returns what `predict_step` gives with the state of this moment for each example, as NumPy arrays.

        Args:
            data: a source.
            weights: as for `evaluate`.
            limit: as for `evaluate`.
            out: as for `Trainer.predict`.

        Raises:
            RuntimeError: the call of the hook is over.
        """
        return self._answers("predict").predict(data, weights=weights, limit=limit, out=out)

    def apply(
        self,
        fn: Callable[..., Any],
        *args: Any,
        weights: str = "averaged",
        rng: jax.Array | int | None = None,
    ) -> PyTree:
        """Returns what `fn(model, *args)` gives with the state of this moment, on the devices.

        It runs in the scope of the bound module as `loss` does, but not training: what it changes is dropped. It is
        compiled once and kept by `fn`, so define `fn` outside of the hook.

        Args:
            fn: e.g. `lambda model, z: model.decode(z)`; one with a parameter named `ctx` is given the `StepContext`.
            *args: trees of arrays and numbers.
            weights: as for `evaluate`.
            rng: a key or an int, of all streams of the module; by default that of the step.

        Raises:
            RuntimeError: the call of the hook is over.
            TypeError: `fn` is no function, or `args` hold something else.
        """
        return self._answers("apply").apply(fn, *args, weights=weights, rng=rng)

    def layers(self) -> list[Layer]:
        """Returns the modules of the model: shapes in and out, parameters, operations, by one trace of an evaluation.

        Raises:
            RuntimeError: the call of the hook is over.
        """
        return self._answers("layers").layers()

    def expire(self) -> None:
        """Ends the validity of `state` and of the questions; the loop calls this after the hook."""
        self.__dict__["_state"] = self.__dict__["_asked"] = None

    def _answers(self, question: str) -> Asked:
        if self._asked is None:
            raise RuntimeError(
                f"info.{question} answers only during the hook it was given to; ask there, or trainer.{question} "
                "after the fit."
            )
        return self._asked
