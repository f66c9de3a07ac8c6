"""`Trainer`: the surface that users subclass, and the wiring behind it. Owns no step and no order of events."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, final

import clu.metrics
import flax.linen as nn
import jax
import optax

from trainkit._allocator import freed_memory_is_kept, keep_freed_memory, switched_on
from trainkit._arguments import (
    check_accumulate,
    check_callbacks,
    check_length,
    check_metrics,
    check_steps_per_call,
    eval_sources,
    peek,
    with_defaults,
)
from trainkit._calls import CallSettings
from trainkit._context import StepContext
from trainkit._engine import Engine
from trainkit._evaluate import evaluate, predict
from trainkit._history import History
from trainkit._interrupts import Interrupts
from trainkit._loop import Loop, Position, Request
from trainkit._model import LinenModel
from trainkit._overview import overview
from trainkit._precision import resolve_precision
from trainkit._recording import open_writers
from trainkit._result import FitResult
from trainkit._state import TrainState
from trainkit._step import Steps, UserFunctions
from trainkit._tree import copy_arrays
from trainkit._typing import Batch, Outputs, PyTree
from trainkit._when import Cadence, as_cadence
from trainkit.callbacks._callback import Callback
from trainkit.data._global_batch import GlobalBatch
from trainkit.data._source import as_source
from trainkit.metrics._accumulator import LossMetrics
from trainkit.parallel._resolve import resolve_strategy
from trainkit.parallel._strategy import Strategy
from trainkit.writers._logdir import local_folder
from trainkit.writers._writer import MetricWriter

_OVERRIDABLE = ("loss", "metrics", "train_step", "eval_step", "predict_step", "init_variables")


class Trainer:
    """Trains a Flax module. Subclass it and write `loss`.

    The whole surface of a subclass is `loss`, `metrics`, and for full control `train_step`, `eval_step`,
    `predict_step` and `init_variables`; all else is final.

    Args:
        model: a `flax.linen.Module`, unbound.
        tx: an optax transformation.
        callbacks: objects, in the order in which they run within a phase.
        strategy: how a step runs on the devices: `"jit"` (all devices) or a `tk.parallel` object.
        seed: int, of the initialisation and of every random number of the run.
        precision: `"float32"`, `"bfloat16"` or `"float16"`: the dtype in which the model computes. Parameters,
            statistics, losses and metrics stay float32; float16 scales the loss and skips updates that overflow.
        accumulate: int, batches whose gradients make one update, exactly that of the joined batch.
        remat: recompute activations in the backward pass instead of keeping them; True, or a policy of
            `jax.checkpoint_policies`.
        logdir: folder for TensorBoard and JSONL logs; None writes none.
        writers: further objects of `MetricWriter`; they are flushed, and stay yours to close.
        steps_per_call: training steps in one call of a compiled program, where nothing is due between them: an int
            of at least 1, the most; `"auto"` finds by measurement what is fastest, see `docs/speed.md`. Beyond
            rounding the results are those of 1.
        cpu_settings: on a CPU, let the allocator of glibc keep what XLA frees, and let `"auto"` try XLA's other
            scheduler. The environment variable `TRAINKIT_CPU_SETTINGS=0` turns it off as well.

    Raises:
        TypeError: an argument is of the wrong kind, e.g. a callback class instead of an object.
        ValueError: two callbacks want the same name in `state.hooks`, or `logdir` is remote.

    Example:
        >>> import flax.linen as nn, numpy as np, optax, trainkit as tk
        >>> class Regression(tk.Trainer):
        ...     def loss(self, model, batch, ctx):
        ...         prediction = model(batch["x"])
        ...         return ((prediction - batch["y"]) ** 2).mean(axis=-1), {}
        >>> x = np.ones((8, 3), np.float32)
        >>> result = Regression(nn.Dense(1), optax.sgd(0.1)).fit([{"x": x, "y": x[:, :1]}], steps=5)
        >>> result.step
        5
    """

    metrics: ClassVar[type[clu.metrics.Collection]] = LossMetrics

    def __init__(
        self,
        model: nn.Module,
        tx: optax.GradientTransformation,
        *,
        callbacks: Sequence[Callback] = (),
        strategy: str | Strategy = "jit",
        seed: int = 0,
        precision: str = "float32",
        accumulate: int = 1,
        remat: bool | Callable[..., bool] = False,
        logdir: str | os.PathLike[str] | None = None,
        writers: Sequence[MetricWriter] = (),
        steps_per_call: int | Literal["auto"] = "auto",
        cpu_settings: bool = True,
    ) -> None:
        self._precision = resolve_precision(precision)
        self._model = LinenModel(model, self._precision)
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(f"tx={tx!r}: expected an optax transformation, e.g. optax.adam(1e-3).")
        self._tx = tx
        self._callbacks = with_defaults(check_callbacks(callbacks))
        self._strategy = resolve_strategy(strategy)
        self._seed, self._remat = seed, remat
        self._accumulate = check_accumulate(accumulate, own_step=self._overridden("train_step") is not None)
        self._logdir = None if logdir is None else local_folder(logdir)
        self._writers = tuple(writers)
        self._cpu_settings = cpu_settings and switched_on()
        self._settings = CallSettings(check_steps_per_call(steps_per_call), self._cpu_settings)
        self._history = History()
        self._position = Position()
        self._data: Any = None
        self._state: TrainState | None = None
        self._shown = False
        check_metrics(self.metrics)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fixed = [name for name in vars(cls) if name in _FINAL]
        if fixed:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(fixed)}, which trainkit keeps to itself. A subclass may define "
                f"{', '.join(_OVERRIDABLE)}; for anything that happens around the steps write a callback."
            )

    # What a subclass defines ----------------------------------------------------------------------------------

    def loss(self, model: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array, Outputs]:
        """Returns the losses of a batch and what the metrics are computed from. The one method you must write.

        The call runs inside the scope of the bound module: `model(x)`, `model.encode(x)`,
        `model.make_rng("dropout")` and several calls in a row work, and changed collections are kept.

        Args:
            model: your module, bound.
            batch: leaves `[batch, ...]`.
            ctx: what is known of the step.

        Returns:
            `losses`, float `[batch]` (or a scalar: then no batch is ever padded), and `outputs`, a mapping that
            the metrics get as keyword arguments with `loss` `[batch]` and `mask` `bool[batch]`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no loss. Define loss(self, model, batch, ctx) and return (losses, outputs), "
            "e.g. return optax.l2_loss(model(batch['x'])[:, 0], batch['y']), {}."
        )

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Outputs]:
        """Returns the state after one update, and the outputs for the metrics. Traced; override for full control.

        One call is one step, however often `apply_gradients` is called in it; batches are never padded. The key
        of the step is `jax.random.fold_in(state.rng, state.step)`.

        Args:
            state: before the update; its `step` is counted up by trainkit.
            batch: leaves `[batch, ...]`.

        Returns:
            The state, of the same structure, shapes and dtypes, and a mapping of what the metrics ask for.
        """
        return self._engine.steps.default_update(state, batch)

    def eval_step(self, state: TrainState, batch: Batch) -> Outputs:
        """Returns one batch's outputs for the metrics. Traced; by default those of `loss`, not training.

        The last rows of `batch` may be padding, which is masked afterwards; every output has one row per example.
        """
        return self._engine.steps.default_eval(state, batch)

    def predict_step(self, model: Any, batch: Batch, ctx: StepContext) -> PyTree:
        """Returns predictions, leaves `[batch, ...]`; runs in the scope of the bound module as `loss` does.

        By default the outputs of `loss`; override it to predict without labels.

        Raises:
            KeyError: `loss` needs what the batch has not, such as labels.
        """
        try:
            return self.loss(model, batch, ctx)[1]
        except KeyError as error:
            raise KeyError(
                f"{error.args[0]} is not in the batch. By default predict runs loss; to predict without it define "
                "predict_step(self, model, batch, ctx), e.g. return model(batch['image'], train=False)."
            ) from error

    def init_variables(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
        """Returns the variables to start from, `{"params": ..., ...}`. Traced; by default those `loss` creates."""
        return self._engine.steps.init_variables(rng, batch)

    # What a user calls ----------------------------------------------------------------------------------------

    @final
    @property
    def state(self) -> TrainState:
        """The current train state; set it to continue from another one, e.g. one with loaded weights.

        Raises:
            RuntimeError: there is none before `init` or the first `fit`.
            TypeError: it is set to something else than a `TrainState`.
        """
        if self._state is None:
            raise RuntimeError("there is no state yet: call trainer.init(batch) or trainer.fit(...) first.")
        self._shown = True
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise TypeError(f"trainer.state must be a tk.TrainState, got {type(state).__name__}.")
        self._state, self._shown = state, True

    @final
    @property
    def history(self) -> History:
        """Every scalar logged so far, over all fits; also after one that raised."""
        return self._history

    @final
    def init(self, batch: Batch) -> TrainState:
        """Initialises from the seed and the shapes of one batch, and returns the state.

        Args:
            batch: leaves `[batch, ...]`, as `fit` will see them.
        """
        self._state = self._engine.init(self._seed, batch)
        return self.state

    @final
    def fit(
        self,
        data: Any,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_data: Any = None,
        eval_every: Cadence | None = None,
    ) -> FitResult:
        """Trains, and returns what came of it. A second call continues where the first ended.

        SIGTERM and Ctrl-C let the running step finish, close everything and return with `stopped_by` set; a
        second Ctrl-C raises KeyboardInterrupt at once. Of several processes one signal ends all, at the same
        step: they agree every 32 steps, on signals and on the time of `Every(seconds=...)`.

        Args:
            data: `tk.data.Arrays`, any other source or re-iterable of batches, or a function returning an iterator.
            epochs: int >= 1, passes over `data`; or
            steps: int >= 1, updates.
            eval_data: one source, reported as `eval/...`, or a mapping of names to sources.
            eval_every: a cadence; by default after every epoch and at the end.

        Returns:
            The result, with the state, the history and why the fit ended.

        Raises:
            ValueError: not exactly one of `epochs` and `steps`; bad data; a loss that returns the wrong thing.
            OSError: `logdir` can't be made or written to.
        """
        check_length(epochs, steps)
        if eval_every is not None:
            as_cadence(eval_every, "eval_every")
        source, evaluations = as_source(data), eval_sources(eval_data)
        self._aim_at(data)
        request = Request(
            source, epochs, steps, evaluations, eval_every, self._accumulate, self._callbacks, self._logdir
        )
        interrupts = Interrupts(alone=self._strategy.processes == 1)
        if self._cpu_settings and jax.default_backend() == "cpu":
            keep_freed_memory()
        # The logs first: a folder that can't be written to is refused before anything compiles.
        with interrupts.listening(), open_writers(self._logdir, self._writers, self._history) as writer:
            first, batches = peek(self._engine, source, self._position)
            loop = Loop(
                self._engine,
                request,
                state=self._begin(first),
                first=first,
                batches=batches,
                position=self._position,
                writer=writer,
                history=self._history,
                interrupts=interrupts,
            )
            try:
                return loop.run()
            finally:
                self._state, self._shown = loop.state, True

    @final
    def evaluate(self, data: Any, *, weights: Literal["ema", "live"] = "ema") -> dict[str, Any]:
        """Returns the metrics over one pass of `data`, exact: each example counted once.

        Args:
            data: as for `fit`.
            weights: "ema" for the averaged weights where a callback keeps an average, "live" for the current ones.

        Returns:
            Floats by name, NumPy arrays for metrics that are not scalars.
        """
        metrics = evaluate(self._engine, self._weights(weights), as_source(data))
        assert metrics is not None  # nothing interrupts it here
        return metrics

    @final
    def predict(self, data: Any, *, weights: Literal["ema", "live"] = "ema") -> PyTree:
        """Returns what `predict_step` gives for each example of `data`, in order, as NumPy arrays.

        Args:
            data: as for `fit`.
            weights: as for `evaluate`.
        """
        return predict(self._engine, self._weights(weights), as_source(data))

    @final
    def summary(self) -> str:
        """Returns a table of the parameters: names, shapes, counts, bytes; then the totals, and how steps run."""
        allocator = "keeps freed memory" if freed_memory_is_kept() else "as it was"
        settings = {
            "layout": self._strategy.describe(),
            "steps per call": self._engine.describe_calls(),
            **({"allocator": allocator} if jax.default_backend() == "cpu" else {}),
        }
        return overview(self.state, settings)

    # Wiring ---------------------------------------------------------------------------------------------------

    @final
    def _exportable(
        self, weights: Literal["ema", "live"]
    ) -> tuple[Callable[[PyTree, Batch], PyTree], PyTree]:
        """What `tk.export` takes: a pure function of `(arrays, batch)` that predicts, and its arrays."""
        return self._engine.prediction(self._weights(weights))

    @final
    @functools.cached_property
    def _engine(self) -> Engine:
        hooks = tuple(hook for callback in self._callbacks if (hook := callback.step_hook()) is not None)
        user = UserFunctions(
            loss=self.loss,
            predict_step=self.predict_step,
            init_variables=self._overridden("init_variables"),
            train_step=self._overridden("train_step"),
            eval_step=self._overridden("eval_step"),
        )
        steps = Steps(
            model=self._model,
            tx=self._tx,
            strategy=self._strategy,
            hooks=hooks,
            user=user,
            precision=self._precision,
            accumulate=self._accumulate,
            remat=self._remat,
        )
        return Engine(
            steps, self._strategy, self.metrics, scaled=self._precision.scaled, settings=self._settings
        )

    def _overridden(self, name: str) -> Any:
        return None if getattr(type(self), name) is getattr(Trainer, name) else getattr(self, name)

    def _aim_at(self, data: Any) -> None:
        # The same data goes on inside its pass; other data begin a pass of their own.
        if data is not self._data:
            self._position.batch = 0
        self._data = data

    def _begin(self, first: Batch | GlobalBatch) -> TrainState:
        if self._state is None:
            self._state = self._engine.init(self._seed, first)
            self._shown = False
        # The step takes the buffers of its state: what the user may still hold is left whole.
        state = copy_arrays(self.state) if self._shown else self._state
        assert state is not None
        return self._engine.complete(state, self._seed)

    def _weights(self, weights: str) -> TrainState:
        if weights not in ("ema", "live"):
            raise ValueError(f"weights={weights!r}: the choices are 'ema' and 'live'.")
        return self._engine.averaged(self.state) if weights == "ema" else self.state


_FINAL = frozenset(
    name for name in vars(Trainer) if not name.startswith("__") and name not in (*_OVERRIDABLE,)
)
