"""`Trainer`: the surface that users subclass, and the wiring behind it. Owns no step and no order of events."""

import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import jax
import optax

from trainkit._calls.calls import CallSettings
from trainkit._core.cadence import Cadence, as_cadence
from trainkit._core.state import TrainState
from trainkit._core.typing import Batch, PyTree
from trainkit._debug.diagnosis import Diagnosis
from trainkit._debug.replay import Replay
from trainkit._engine.cpu_settings import describe_allocator, set_up_cpu, switched_on
from trainkit._engine.engine import Engine
from trainkit._loop.fit import first_spec, fit
from trainkit._loop.questions import eval_sources, limited
from trainkit._loop.request import Request
from trainkit._loop.result import FitResult, with_result
from trainkit._loop.run import FIT_INSTEAD, Run, restore
from trainkit._models.choose import model_of
from trainkit._models.precision import resolve_precision
from trainkit._resume.restore import Restored
from trainkit._step.forward import UserFunctions
from trainkit._step.given import Constants
from trainkit._step.steps import Steps
from trainkit._trainer.arguments import (
    check_accumulate,
    check_callbacks,
    check_dry_run,
    check_hparams,
    check_interrupt,
    check_length,
    check_metrics,
    check_steps_per_call,
    resolve_strategy,
    with_defaults,
)
from trainkit._trainer.asking import Asking
from trainkit._trainer.overridable import OVERRIDABLE
from trainkit._trainer.run_card import run_card
from trainkit._trainer.summary import overview
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._checkpoint import Checkpoint
from trainkit.checkpoint._store import Store
from trainkit.optim._by_path import ByPath
from trainkit.optim._staged import staged
from trainkit.parallel._strategy import Strategy
from trainkit.writers._logdir import local_folder
from trainkit.writers._writer import MetricWriter


class Trainer(Asking):
    """Trains a Flax module. Subclass it and write `loss`.

    The whole surface of a subclass is `loss`, `metrics`, `batch_axis`, and for full control `train_step`, `eval_step`,
    `predict_step` and `init_variables`; all else is final.

    Args:
        model: a `flax.linen.Module`, unbound; or a `flax.nnx.Module`, whose weights are the start and which is never
            written, or a function of `rngs` that makes one.
        tx: an optax transformation.
        callbacks: objects, in the order in which they run within a phase.
        strategy: how a step runs on the devices: `"jit"` (all devices) or a `tk.parallel` object.
        seed: int, of the initialisation and of every random number of the run.
        precision: `"float32"`, `"bfloat16"` or `"float16"`: the dtype in which the model computes. Parameters,
            statistics, losses and metrics stay float32; float16 scales the loss and skips updates that overflow.
        accumulate: int, batches whose gradients make one update, exactly that of the joined batch.
        remat: recompute activations in the backward pass instead of keeping them; True, or a policy of
            `jax.checkpoint_policies`.
        hparams: hyperparameters by name: bool, int, float, str, or mappings and lists of these. The numbers among them
            (not True and False) reach `loss` and `predict_step` as `float32[]` in `ctx.hparams`. All are logged with
            the seed, the batch size and injected hyperparameters, for TensorBoard's HPARAMS page; see `HParams`.
        logdir: folder for TensorBoard and JSONL logs; None writes none.
        writers: further objects of `MetricWriter`; they are flushed, and stay yours to close.
        steps_per_call: training steps in one call of a compiled program, where nothing is due between them: an int
            of at least 1, the most; `"auto"` finds by measurement what is fastest, see `docs/speed.md`. Beyond
            rounding the results are those of 1.
        cpu_settings: on a CPU, let the allocator of glibc keep what XLA frees, and let `"auto"` try XLA's other
            scheduler. The environment variable `TRAINKIT_CPU_SETTINGS=0` turns it off as well.
        keep_compiled: keep compiled programs in the user's cache, `$XDG_CACHE_HOME/trainkit`, so that neither the same
            command started again nor another run of the same program waits for the compiler; a cache that JAX was
            already given is used instead.
        overwrite: a `logdir` that holds another run is refused; True removes that run when the first fit begins: the
            files that trainkit wrote there, in the folders of its `Checkpoint`s too, and nothing else.
        interrupt: what follows when Ctrl-C has ended a fit and all is saved and closed: "return" the result, or
            "raise" KeyboardInterrupt, with the result as its `.result`, so that a loop over trainers ends.
        dry_run: int >= 1: every fit runs so many steps, evaluations of as many batches, and at its last step every
            callback and every save, whatever its cadence; logs and checkpoints go to a temporary folder, which is
            `info.logdir`, your own `writers` get nothing, and `resume` is ignored. To see that a long run will work.
        frozen: trees of arrays by name, such as the variables of a teacher: every step takes them as arguments, in
            `ctx.frozen`. They are neither trained nor saved; a run is resumed with equal ones only.

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
        model: Any,
        tx: optax.GradientTransformation,
        *,
        callbacks: Sequence[Callback] = (),
        strategy: str | Strategy = "jit",
        seed: int = 0,
        precision: str = "float32",
        accumulate: int = 1,
        remat: bool | Callable[..., bool] = False,
        hparams: Mapping[str, Any] | None = None,
        logdir: str | os.PathLike[str] | None = None,
        writers: Sequence[MetricWriter] = (),
        steps_per_call: int | Literal["auto"] = "auto",
        cpu_settings: bool = True,
        keep_compiled: bool = True,
        overwrite: bool = False,
        interrupt: Literal["return", "raise"] = "return",
        dry_run: int | None = None,
        frozen: Mapping[str, PyTree] | None = None,
    ) -> None:
        self._precision = resolve_precision(precision)
        self._model = model_of(model, self._precision)
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(f"tx={tx!r}: expected an optax transformation, e.g. optax.adam(1e-3).")
        self._tx = tx
        self._hparams = check_hparams(hparams)
        self._callbacks = with_defaults(check_callbacks(callbacks), logs_hparams=hparams is not None)
        self._strategy = resolve_strategy(strategy, self.batch_axis)
        self._seed, self._remat = seed, remat
        self._accumulate = check_accumulate(accumulate, own_step=self._overridden("train_step") is not None)
        self._logdir = None if logdir is None else local_folder(logdir)
        self._writers = tuple(writers)
        self._run = Run()
        self._keep_compiled, self._overwrite = keep_compiled, overwrite
        self._cpu_settings = cpu_settings and switched_on()
        self._interrupt, self._dry_run = check_interrupt(interrupt), check_dry_run(dry_run)
        # A dry run measures nothing, and leaves nothing of what it measured.
        calls = 1 if dry_run is not None and steps_per_call == "auto" else steps_per_call
        self._settings = CallSettings(check_steps_per_call(calls), self._cpu_settings)
        self._constants = Constants(frozen, hparams)
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
    def init(self, batch: Batch) -> TrainState:
        """Initialises from the seed and the shapes of one batch, and returns the state.

        Args:
            batch: leaves `[batch, ...]`, as `fit` will see them.
        """
        self._run.refuse_in_fit("init", "return tk.Stop(reason) from the hook, and call it after the fit")
        if self._cpu_settings:
            set_up_cpu(self._engine.steps, lambda: batch)
        self._run.become(self._engine.init(self._seed, batch), shown=False)
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
        limit: int | None = None,
        resume: bool = False,
    ) -> FitResult:
        """Trains, and returns what came of it. A second call continues where the first ended.

        SIGTERM, SIGHUP and Ctrl-C let the running step finish, save, close everything and return with `stopped_by`
        set; a second Ctrl-C raises KeyboardInterrupt at once. SIGUSR1 saves and goes on. A program's own handlers of
        SIGHUP and SIGUSR1 are left alone; in another thread than the main one no signal is heard. Of several processes
        one signal does it on all, at the same step: they agree every 32 steps, or every 10 seconds where steps are
        slow, on signals and on the time of `Every(seconds=...)`.

        Args:
            data: `tk.data.Arrays`, any other source or re-iterable of batches, or a function returning an iterator.
            epochs: int >= 1, passes over `data`; or
            steps: int >= 1, updates.
            eval_data: one source, reported as `eval/...`, or a mapping of names to sources.
            eval_every: a cadence; by default after every epoch and at the end.
            limit: int >= 1, batches of each pass over `data` at most; needed where `data` are endless and `epochs` is
                given. (`tk.data.take` limits evaluation data.)
            resume: go on from the newest complete checkpoint of the run, such that the finished run cannot be
                told from one that was never interrupted; start afresh where there is none. `epochs` and `steps`
                count from where that fit began, so the same command is simply run again. Needs a `Checkpoint`.

        Returns:
            The result, with the state, the history and why the fit ended.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the fit, and the trainer has `interrupt="raise"`; with `.result`.
            RuntimeError: a fit of this trainer runs, in this thread or another.
            ValueError: not exactly one of `epochs` and `steps`; bad data; a loss that returns the wrong thing; a
                checkpoint of another model; `resume` without a `Checkpoint`, or with `overwrite`; `logdir` holds
                another run, or another writes to it.
            OSError: `logdir` can't be made or written to, or a checkpoint could not be saved.
        """
        self._run.refuse_in_fit("fit", FIT_INSTEAD)
        check_length(epochs, steps)
        if eval_every is not None:
            as_cadence(eval_every, "eval_every")
        source = limited(self._source_of(data), limit)
        evaluations = eval_sources(eval_data, units=self.batch_axis is None)
        if resume and self._overwrite:
            raise ValueError(
                "resume=True and Trainer(overwrite=True): a run is gone on with or started over. Leave one of them out."
            )
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
            seed=self._seed,
            writers=self._writers,
            stores=tuple(stores),
            keep_compiled=self._keep_compiled,
            overwrite=self._overwrite,
            hparams=self._hparams,
            card=lambda: run_card(self.summary()),
        )
        if self._cpu_settings:
            set_up_cpu(self._engine.steps, lambda: first_spec(source))
        if self._dry_run is not None:
            with tempfile.TemporaryDirectory(prefix="trainkit-dry-run-") as folder:
                result = fit(self._engine, self._run, request.as_dry_run(self._dry_run, pathlib.Path(folder)))
        else:
            result = fit(self._engine, self._run, request)
        if self._interrupt == "raise" and result.stopped_by == "SIGINT":
            raise with_result(KeyboardInterrupt("Ctrl-C ended the fit; its result is in .result"), result)
        return result

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
        fine-tuning; step, optimizer and all else stay, and what was left is told. Of a checkpoint of weights only
        (`Checkpoint(weights_only=True)`) step, model and averages are taken, for evaluations or as the start of another
        run: the optimizer begins afresh, and history and place in the data stay.

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
        self._run.refuse_in_fit(
            "restore",
            "return tk.Rollback(reason) from the hook to go back to the newest checkpoint, or tk.Stop",
        )
        return restore(self._engine, self._run, path, step, partial)

    @final
    def reset(self, seed: int | None = None) -> None:
        """Makes the trainer as new, with what was compiled kept: for folds, repetitions, sweeps.

        State, history and the place in the data are gone, and callbacks begin afresh. Files that were written stay:
        give each run a trainer, or a `logdir`, of its own where they matter.

        Args:
            seed: int, of the run to come; None keeps that of the trainer.

        Raises:
            RuntimeError: `fit` runs.
        """
        self._run.refuse_in_fit("reset", "return tk.Stop(reason) from the hook, and call it after the fit")
        self._run = Run()
        self._seed = self._seed if seed is None else seed

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
        store = next((Store(keeper.folder(self._logdir)) for keeper in self._keepers()), None)
        data = self._run.data if data is None else data
        source = None if data is None else self._source_of(data)
        return Replay(self._engine, self._logdir, store, source, self._accumulate).run(
            step, self._run.current("replay"), jit=jit
        )

    @final
    def summary(self) -> str:
        """Returns a table of the parameters: names, shapes, counts, bytes; then the totals, and how steps run."""
        settings = {
            "layout": self._strategy.describe(),
            "steps per call": self._engine.describe_calls(),
            **({"allocator": describe_allocator()} if jax.default_backend() == "cpu" else {}),
        }
        group_of = self._tx.group_of if isinstance(self._tx, ByPath) else None
        return overview(self._current("summary"), settings, group_of)

    # Wiring ---------------------------------------------------------------------------------------------------

    @final
    @functools.cached_property
    def _engine(self) -> Engine:
        self._strategy = self._strategy.with_names(self._model.names())
        hooks = tuple(hook for callback in self._callbacks if (hook := callback.step_hook()) is not None)
        probes = tuple(probe for callback in self._callbacks if (probe := callback.step_probe()) is not None)
        user = UserFunctions(
            loss=self.loss,
            predict_step=self.predict_step,
            init_variables=self._overridden("init_variables"),
            train_step=self._overridden("train_step"),
            eval_step=self._overridden("eval_step"),
            units=self.batch_axis is None,
        )
        stages = next((found for one in self._callbacks if (found := one._stages()) is not None), None)
        steps = Steps(
            model=self._model,
            tx=self._tx if stages is None else staged(self._tx, stages.patterns),
            strategy=self._strategy,
            hooks=hooks,
            user=user,
            precision=self._precision,
            accumulate=self._accumulate,
            remat=self._remat,
            constants=self._constants,
        )
        return Engine(
            steps,
            self._strategy,
            self.metrics,
            scaled=self._precision.scaled,
            probes=probes,
            views=[view for callback in self._callbacks if (view := callback.eval_view()) is not None],
            settings=self._settings,
            stages=stages,
        )

    def _checkpoints(self) -> list[Store]:
        keepers = self._keepers()
        if not keepers:
            why = (
                " Those with weights_only=True can't be resumed from."
                if any(isinstance(callback, Checkpoint) for callback in self._callbacks)
                else ""
            )
            raise ValueError(
                f"resume=True needs checkpoints: add tk.callbacks.Checkpoint() to the callbacks.{why}"
            )
        return [Store(keeper.folder(self._logdir)) for keeper in keepers]

    def _keepers(self) -> list[Checkpoint]:
        """Returns the checkpoints that hold the whole run."""
        keepers = [callback for callback in self._callbacks if isinstance(callback, Checkpoint)]
        return [keeper for keeper in keepers if not keeper.weights_only]


_FINAL = frozenset(
    name
    for one in (Trainer, Asking)
    for name in vars(one)
    if not name.startswith("__") and name not in OVERRIDABLE
)
