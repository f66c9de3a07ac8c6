"""`Trainer`: the surface that users subclass, and the wiring behind it. Owns no step and no order of events."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import flax.linen as nn
import jax
import optax

from trainkit._calls.calls import CallSettings
from trainkit._core.cadence import Cadence, as_cadence
from trainkit._core.history import History
from trainkit._core.state import TrainState
from trainkit._core.tree import copy_arrays
from trainkit._core.typing import Batch, PyTree
from trainkit._debug.diagnosis import Diagnosis
from trainkit._debug.replay import Replay
from trainkit._engine.compile_ahead import compile_ahead
from trainkit._engine.compile_cache import kept_on_disk
from trainkit._engine.cpu_settings import arena_is_shared, describe_allocator, set_up_cpu, switched_on
from trainkit._engine.engine import Engine
from trainkit._loop.evaluate import evaluate, predict
from trainkit._loop.interrupts import Interrupts
from trainkit._loop.loop import Loop
from trainkit._loop.request import Request
from trainkit._loop.result import FitResult
from trainkit._loop.run import Run, restore
from trainkit._models.linen import LinenModel
from trainkit._models.precision import resolve_precision
from trainkit._resume.restore import Restored, restore_state
from trainkit._step.forward import UserFunctions
from trainkit._step.steps import Steps
from trainkit._trainer.arguments import (
    check_accumulate,
    check_callbacks,
    check_length,
    check_metrics,
    check_steps_per_call,
    eval_sources,
    first_spec,
    peek,
    resolve_strategy,
    with_defaults,
)
from trainkit._trainer.overridable import OVERRIDABLE, Overridable
from trainkit._trainer.summary import overview
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.checkpoint._store import Store
from trainkit.data._batch import GlobalBatch
from trainkit.data._source import as_source
from trainkit.parallel._strategy import Strategy
from trainkit.writers._logdir import local_folder, locked
from trainkit.writers._open import open_writers
from trainkit.writers._writer import MetricWriter


class Trainer(Overridable):
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
        keep_compiled: keep compiled programs in `logdir`, so that the same command started again does not wait
            for the compiler; a cache that JAX was already given is used instead.

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
        keep_compiled: bool = True,
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
        self._run = Run()
        self._keep_compiled = keep_compiled
        self._cpu_settings = cpu_settings and switched_on()
        self._settings = CallSettings(check_steps_per_call(steps_per_call), self._cpu_settings)
        self._state: TrainState | None = None
        self._shown = False
        check_metrics(self.metrics)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fixed = [name for name in vars(cls) if name in _FINAL]
        if fixed:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(fixed)}, which trainkit keeps to itself. A subclass may define "
                f"{', '.join(OVERRIDABLE)}; for anything that happens around the steps write a callback."
            )

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
        return self._run.history

    @final
    def init(self, batch: Batch) -> TrainState:
        """Initialises from the seed and the shapes of one batch, and returns the state.

        Args:
            batch: leaves `[batch, ...]`, as `fit` will see them.
        """
        if self._cpu_settings:
            set_up_cpu(self._engine.steps, lambda: batch)
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
        resume: bool = False,
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
            resume: go on from the newest complete checkpoint of the run, such that the finished run cannot be
                told from one that was never interrupted; start afresh where there is none. `epochs` and `steps`
                count from where that fit began, so the same command is simply run again. Needs a `Checkpoint`.

        Returns:
            The result, with the state, the history and why the fit ended.

        Raises:
            ValueError: not exactly one of `epochs` and `steps`; bad data; a loss that returns the wrong thing; a
                checkpoint of another model; `resume` without a `Checkpoint`; another run writes to `logdir`.
            OSError: `logdir` can't be made or written to, or a checkpoint could not be saved.
        """
        check_length(epochs, steps)
        if eval_every is not None:
            as_cadence(eval_every, "eval_every")
        source, evaluations = as_source(data), eval_sources(eval_data)
        stores = self._checkpoints() if resume else []
        source = self._run.aim_at(data, source)
        request = Request(
            fit=self._run.fits + 1,
            source=source,
            epochs=epochs,
            steps=steps,
            evaluations=evaluations,
            eval_every=eval_every,
            accumulate=self._accumulate,
            callbacks=self._callbacks,
            logdir=self._logdir,
        )
        if self._cpu_settings:
            set_up_cpu(self._engine.steps, lambda: first_spec(source))
        interrupts = Interrupts(alone=self._strategy.processes == 1)
        # The logs first: a folder that can't be written to is refused before anything compiles.
        with (
            interrupts.listening(),
            locked(None if jax.process_index() else self._logdir),
            open_writers(self._logdir, self._writers, self._run.history) as writer,
            kept_on_disk(self._logdir if self._keep_compiled else None),
        ):
            found = self._run.find(stores, writer, self._steps_done)
            saved = None if found is None else found[1]
            first, batches = peek(self._engine, source, self._run)
            if found is not None:
                current = self._state or self._engine.init_spec(first)
                self._state = restore_state(self._engine, found[0], found[1].step, current)
                self._shown = False
            if saved is not None and saved.fit > request.fit:
                self._run.begin(saved)
                # The run was in a later fit when it ended: this one is done.
                return FitResult(
                    state=self.state,
                    step=saved.step,
                    epoch=saved.epoch,
                    seconds=0.0,
                    stopped_by=None,
                    history=self._run.history,
                )
            loop = Loop(
                self._engine,
                request,
                state=self._begin(request, first),
                first=first,
                batches=batches,
                position=self._run.position,
                writer=writer,
                history=self._run.history,
                interrupts=interrupts,
                resumed=saved,
            )
            self._run.begin(saved)
            try:
                return loop.run()
            finally:
                self._state, self._shown = loop.state, True
                self._run.put_down(loop.unread)

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
    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | Literal["latest", "best"] = "latest",
        partial: bool | Sequence[str] = False,
    ) -> Restored:
        """Loads the state of a checkpoint into `trainer.state`.

        The whole of it sets this trainer to that step: state, history and place in the data; a fit then goes on
        from there, with callbacks that begin afresh. (`fit(..., resume=True)` is what goes on exactly.) With
        `partial`, only parameters and mutable collections of equal path, shape and dtype are taken, as for
        fine-tuning; step, optimizer and all else stay, and what was left is told.

        Args:
            path: a `logdir`, its folder of checkpoints, or one checkpoint.
            step: which one: a step, the newest, or the best by the `best=` it was saved under.
            partial: True, or prefixes of path names, e.g. `("params/encoder",)`. Needs a state: call `init` first.

        Returns:
            What was loaded and what was left.

        Raises:
            FileNotFoundError: there is no such checkpoint; the message lists those there are.
            ValueError: it is damaged, or of another model; the message lists paths, shapes and dtypes.
            RuntimeError: `partial`, and the trainer has no state.
        """
        self._state, restored = restore(self._engine, self._run, self._state, path, step, partial)
        self._shown = False
        return restored

    @final
    def replay(self, step: int, *, data: Any = None, jit: bool = True) -> Diagnosis:
        """Runs one training step again and says where it stops being finite. Changes nothing.

        A step that raised, or that `NanGuard("raise")` refused, left its batch in `<logdir>/failures`; a refused
        one the state before it too. Else the state is that of the nearest checkpoint before, from which the steps
        up to this one are run on `data`, without what callbacks changed in between.

        Args:
            step: number of the step: the updates completed after it.
            data: as for `fit`; by default what this trainer was fitted on.
            jit: compile the step; else each operation runs on its own, so that a debugger can stop in it.

        Returns:
            What was found: the first module whose output was not finite, the first such leaf, the loss.

        Raises:
            FileNotFoundError: there is neither a state kept nor a checkpoint before `step`.
            ValueError: data are needed and there are none, or too few.
        """
        store = next(
            (Store(c.folder(self._logdir)) for c in self._callbacks if isinstance(c, Checkpoint)), None
        )
        data = self._run.data if data is None else data
        source = None if data is None else as_source(data)
        return Replay(self._engine, self._logdir, store, source, self._accumulate).run(
            step, self._state, jit=jit
        )

    @final
    def summary(self) -> str:
        """Returns a table of the parameters: names, shapes, counts, bytes; then the totals, and how steps run."""
        settings = {
            "layout": self._strategy.describe(),
            "steps per call": self._engine.describe_calls(),
            **({"allocator": describe_allocator()} if jax.default_backend() == "cpu" else {}),
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

    @property
    def _steps_done(self) -> int:
        return 0 if self._state is None else int(self._state.step)

    def _checkpoints(self) -> list[Store]:
        keepers = [callback for callback in self._callbacks if isinstance(callback, Checkpoint)]
        if not keepers:
            raise ValueError("resume=True needs checkpoints: add tk.callbacks.Checkpoint() to the callbacks.")
        return [Store(keeper.folder(self._logdir)) for keeper in keepers]

    def _begin(self, request: Request, first: Batch | GlobalBatch) -> TrainState:
        if self._state is None:
            one_device = self._strategy.takes_host_batches and not isinstance(first, GlobalBatch)
            # Threads that compile stand in each other's way where they share one arena of the allocator.
            if one_device and self._accumulate == 1 and not arena_is_shared():
                rows = request.source.batch_size or 0
                compile_ahead(self._engine, request.source, first, rows, request.evaluations)
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
    name for name in vars(Trainer) if not name.startswith("__") and name not in (*OVERRIDABLE,)
)
