"""The compiled steps of one trainer, made at first use and kept. Owns compilation; not the order of calls."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trainkit._calls.calls import ONE_BY_ONE, Calls, CallSettings
from trainkit._core.state import TrainState, key_impl, key_of, with_raw_key
from trainkit._core.tree import copy_arrays, describe, differences, is_key, signature
from trainkit._core.typing import Batch, PyTree
from trainkit._engine.applied import KeptByFunction, check_applied
from trainkit._engine.eval_loop import LoopedFeed, looped
from trainkit._engine.exported import predicting
from trainkit._engine.padding import PaddingCheck
from trainkit._engine.prepared import Prepared
from trainkit._engine.sources import Sources
from trainkit._engine.supplied import Supplied
from trainkit._engine.updates import check_updated
from trainkit._engine.views import Views
from trainkit._feed.feed import Feed, SharedFeed, UnitFeed, no_rows
from trainkit._feed.leaves import parted
from trainkit._feed.resident import pick
from trainkit._step.checks import explained_errors
from trainkit._step.given import Given
from trainkit._step.inspection import Traits, inspect_eval, inspect_probed, inspect_train
from trainkit._step.probes import ProbedSteps
from trainkit._step.statistics import Measured
from trainkit._step.steps import Steps
from trainkit.data._arrays import Arrays
from trainkit.data._batch import GlobalBatch, batch_size_of, check_batch, spec_of, unpad
from trainkit.data._source import Source
from trainkit.hooks._loss_scale import SkippedUpdates
from trainkit.hooks._probe import StepProbe
from trainkit.hooks._view import View
from trainkit.metrics._accumulator import Accumulator
from trainkit.optim._stages import Stages
from trainkit.parallel._strategy import Role, Strategy


def _with_loss_scale(collection: type[clu.metrics.Collection]) -> type[clu.metrics.Collection]:
    """Returns `collection` with the loss scale and the share of skipped updates, for training in float16."""
    extra = {
        "loss_scale": clu.metrics.LastValue.from_output("loss_scale"),
        "skipped_updates": SkippedUpdates,
    }
    return flax.struct.dataclass(type(collection.__name__, (collection,), {"__annotations__": extra}))


class Engine(Sources):
    """Compiles the pure steps under a strategy."""

    def __init__(
        self,
        steps: Steps,
        strategy: Strategy,
        collection: type[clu.metrics.Collection],
        *,
        scaled: bool,
        views: Sequence[View] = (),
        settings: CallSettings = ONE_BY_ONE,
        stages: Stages | None = None,
        probes: tuple[StepProbe, ...] = (),
    ) -> None:
        super().__init__(steps, strategy)
        self.stages = stages
        self.views, self._probed = Views(views, strategy), ProbedSteps(steps, probes)
        self._collections = {"training": _with_loss_scale(collection) if scaled else collection}
        self._collections["evaluation"] = collection
        self._prepared: dict[tuple[Any, ...], tuple[Callable[..., Any], Accumulator, PyTree, Calls]] = {}
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._applied = KeptByFunction()
        self.train_spec: Any = None  # shapes and dtypes of the last training batch that was looked at
        self.others: dict[type[clu.metrics.Collection], Engine] = {}  # that evaluate by other metrics
        self._announced: set[str] = set()
        self._settings = settings
        self._last_calls: Calls | None = None
        self._traits: dict[tuple[Any, ...], Traits] = {}
        self._expected: dict[str, threading.Event] = {}
        self.padding = PaddingCheck(steps, strategy)
        # The checkpoint that a state was made of before a batch could tell what the model is.
        self.unproven: str | None = None

    def expect(self, **kinds: threading.Event) -> None:
        """Notes that steps of some kinds are being compiled, and when that is done."""
        self._expected = kinds

    def wait_for(self, kind: str) -> None:
        """Waits until the steps of a kind are compiled, where that is under way: it would be done twice."""
        if kind in self._expected:
            self._expected.pop(kind).wait()

    def init(self, seed: int, batch: Batch | GlobalBatch) -> TrainState:
        """Returns a fresh state on the devices, initialised by one compiled program."""
        if not isinstance(batch, GlobalBatch):
            batch = parted(batch)[0]
        _, rows = self._first_spec(batch, "initialisation")
        with explained_errors():
            if isinstance(batch, GlobalBatch):
                # Each process reads its rows; the devices, not the hosts, put them together.
                feed = SharedFeed(self.strategy, rows=rows, may_be_partial=False, exact=True, what="first")
                batch = unpad(feed.place(batch).batch, rows)
            return self._init(self.given(), *self.strategy.replicate((jax.random.key(seed), batch)))

    def init_spec(self, batch: Batch | GlobalBatch) -> TrainState:
        """Returns the shapes and dtypes of what `init` returns, without computing it."""
        check_batch(spec_of(batch))
        with explained_errors():
            return jax.eval_shape(self._init, self.steps.constants.spec(), jax.random.key(0), spec_of(batch))

    @functools.cached_property
    def _init(self) -> Callable[..., TrainState]:
        return self.strategy.compile(self.steps.init, inputs=(Role.WHOLE,) * 3, outputs=Role.STATE)

    def given(self) -> Given | None:
        """Returns what steps are given beside state and batch, on the devices; None where that is nothing."""
        return self.steps.constants.placed(self.strategy)

    def held(self, data: PyTree, step: int) -> tuple[Given | None, PyTree]:
        """Returns the third argument of the training step after `step`: what it is given, and data to pick rows of."""
        given, stages = self.given(), self.stages
        if stages is not None:
            given = dataclasses.replace(given or Given(), held_back=stages.held_back(step))
        return given, data

    def complete(self, state: TrainState, seed: int) -> TrainState:
        """Returns `state` on the devices, with the key and the memory of step hooks that it may lack.

        A state made elsewhere, or by a trainer with other callbacks, can be trained on.
        """
        if state.rng is None:
            state = state.replace(rng=jax.random.split(jax.random.key(seed))[1])
        return self.strategy.lay_out(self.steps.with_hooks(state))

    def updated(
        self, state: TrainState, fn: Callable[[TrainState], TrainState], *, by: str
    ) -> tuple[TrainState, bool]:
        """Returns `fn(state)` such that the step, which takes its buffers, need not compile anew.

        Args:
            state: the train state.
            fn: changes values only.
            by: name of who asked for it.

        Returns:
            The state, and whether its `step` is another.

        Raises:
            TypeError: `fn` returned no train state.
            ValueError: `fn` changed structure, shapes, dtypes, or what is no array.
        """
        new = fn(state)
        check_updated(state, new, by=by)
        # The same object tells, without waiting for the devices, that the step did not change.
        moved = new.step is not state.step and not np.array_equal(new.step, state.step)
        return self.strategy.lay_out(copy_arrays(jax.tree.map(_strong, new, state))), moved

    def _prove(self, state: TrainState, first: Batch) -> None:
        """Refuses parameters of a checkpoint that are not those of the model, at the first batch after `restore`."""
        if self.unproven is None:
            return
        try:
            own = self.init_spec(first).params
        except Exception:
            return  # a batch without labels, for one, initialises nothing; the next may
        found = differences(signature({"params": state.params}), signature({"params": own}))
        if found:
            more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
            raise ValueError(
                f"the checkpoint in {self.unproven} is of another model (saved -> now): "
                f"{'; '.join(found[:20])}{more}. Make the trainer with the model that was saved, or call "
                "trainer.init(batch) and load what fits with trainer.restore(..., partial=True)."
            )
        self.unproven = None

    def prepare_train(
        self, state: TrainState, source: Source, first: Batch | GlobalBatch, least_rows: int = 0
    ) -> Prepared:
        """Returns the training step for `source`; refuses what is wrong with it.

        Args:
            state: to train.
            source: of the batches.
            first: the first of them.
            least_rows: to how many rows batches are padded at least, where padding is exact.
        """
        first, rows = self._first_spec(first, "training")
        self.train_spec = first
        self._prove(state, first)
        traits = self._inspect("training", inspect_train, state, first)
        exact, why = traits.per_example and not state.batch_stats, "the model keeps batch statistics"
        if not traits.per_example:
            why = "the loss is a scalar"
        feed = self._feed(
            rows=max(rows, least_rows) if exact else rows,
            may_be_partial=source.may_be_partial,
            exact=exact,
            what="training",
            why=why,
        )
        step = functools.partial(_train, self.steps.train)
        prepared = self._prepare("training", step, self._compiled_train, state, traits, feed)
        self._last_calls = prepared.calls
        if self._probed:
            self._inspect("probed training", functools.partial(inspect_probed, self._probed), state, first)
            pure = functools.partial(_train, self._probed.train, prepared.accumulator, key_impl(state))
            program = self._kept(("probed", prepared.step), lambda: self._compiled_train(pure, Role.WHOLE))
            prepared = prepared._replace(probed=program)
        return prepared

    def _compiled_train(self, step: Callable[..., Any], *more: Role) -> Callable[..., Any]:
        return self.strategy.compile(
            step,
            inputs=(Role.STATE, Role.WHOLE, Role.WHOLE, self._rows, self._rows),
            outputs=(Role.STATE, Role.WHOLE, *more),
            # Where JAX looks at every result, it raises after the arguments are gone: the state is to be left whole.
            donate=() if _debugs_numbers() else (0,),
        )

    def prepare_eval(self, state: TrainState, source: Source, first: Batch | GlobalBatch) -> Prepared:
        """Returns the evaluation step for `source`, as `prepare_train`."""
        first, rows = self._first_spec(first, "evaluation")
        self._prove(state, first)
        traits = self._inspect("evaluation", inspect_eval, state, first)
        exact = traits.per_example
        feed = self._feed(
            rows=rows,
            may_be_partial=source.may_be_partial,
            exact=exact,
            what="evaluation",
            why="the loss is a scalar",
        )
        prepared = self._prepare("evaluation", self.steps.evaluate, self._compiled_eval, state, traits, feed)
        arrays = self._looped_over(source, prepared.accumulator, traits)
        if arrays is not None:
            feed = LoopedFeed(self.strategy, rows)
            evaluation: Any = prepared.step
            step, batches = self._in_loop(evaluation, rows, exact), arrays.pieces(0, feed.examples)
            prepared = prepared._replace(step=step, feed=feed, batches=batches)
        self.wait_for("evaluation")
        zero = self.strategy.replicate(jnp.zeros((), jnp.int32))
        return prepared._replace(empty=(prepared.empty, zero))

    def _compiled_eval(self, step: Callable[..., Any]) -> Callable[..., Any]:
        inputs = (Role.WHOLE, Role.STATE, Role.WHOLE, self._rows, self._rows)
        return self._supplied(step, inputs=inputs, outputs=(Role.WHOLE, self._rows))

    def _supplied(self, step: Callable[..., Any], **roles: Any) -> Supplied:
        """Returns `step(given, ...)` compiled, to be called without `given`."""
        return Supplied(self.strategy.compile(step, **roles), self.given)

    def _in_loop(self, step: Supplied, rows: int, masked: bool) -> Callable[..., Any]:
        key = ("looped", step, rows, masked)
        return self._kept(key, lambda: self._compiled_eval(looped(step.program, rows, masked=masked)))

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """Returns the program under `key`, made at first use. Kept here, and so no longer than this engine."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _looped_over(self, source: Source, accumulator: Accumulator, traits: Traits) -> Arrays | None:
        """Returns `source` where one call evaluates many of its batches, None where each is a call."""
        exact = traits.per_example or not source.may_be_partial
        # Elsewhere than on a CPU the host would decide after each round of the loop whether there is another.
        if not (
            traits.light and exact and jax.default_backend() == "cpu" and self.strategy.takes_host_batches
        ):
            return None
        # A subclass may do anything to its batches.
        plain = type(source) is Arrays and source.is_numeric
        return source if plain and not accumulator.has_collecting else None  # pyright: ignore[reportReturnType]

    def evaluated(self, state: TrainState) -> TrainState:
        """Returns the part of `state` that an evaluation takes: what it does not look at costs time at each call."""
        return state if self.steps.has_own_eval else state.replace(opt_state=(), hooks={})

    def prepare_predict(
        self, state: TrainState, first: Batch | GlobalBatch
    ) -> tuple[Callable[..., Any], Feed]:
        """Returns the prediction step and the feed for batches like `first`."""
        first, rows = self._first_spec(first, "prediction")
        self._prove(state, first)
        feed = self._feed(rows=rows, may_be_partial=True, exact=True, what="prediction")
        return self._predict(key_impl(state)), feed

    def prepare_statistics(
        self, state: TrainState, source: Source, first: Batch | GlobalBatch
    ) -> tuple[Callable[..., Measured], Feed]:
        """Returns the step that measures batch statistics and the feed for `source`; no batch is padded."""
        first, rows = self._first_spec(first, "statistics")
        self._prove(state, first)
        options = {"rows": rows, "may_be_partial": source.may_be_partial, "exact": False}
        feed = self._feed(**options, what="statistics", why="the model keeps batch statistics")
        roles = {"inputs": (Role.WHOLE, Role.STATE, self._rows, self._rows), "outputs": Role.WHOLE}
        impl = key_impl(state)
        step = functools.partial(self.steps.statistics, impl)
        return self._kept(("statistics", impl), lambda: self._supplied(step, **roles)), feed

    def applied(
        self, state: TrainState, fn: Callable[..., Any], args: tuple[Any, ...], rng: jax.Array | int | None
    ) -> PyTree:
        """Returns what `fn(bound module, *args)` gives, on the devices; compiled, and kept by `fn`.

        Args:
            state: the train state.
            fn: called in the scope of the module, not training.
            args: trees of arrays and numbers.
            rng: a key, the seed of one, or None for that of the step.

        Raises:
            TypeError: `fn` is no function, or something in `args` is neither an array nor a number.
        """
        check_applied(fn, args)
        rng = jax.random.key(rng) if isinstance(rng, int) else rng
        impl, bare = key_impl(state), with_raw_key(state.replace(opt_state=(), hooks={}))
        with explained_errors():
            program = self._applied.get((impl, fn), lambda: self._compiled_applied(impl, fn))
            return program(bare, *self.strategy.replicate((args, rng)))

    def _compiled_applied(self, impl: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        inputs = (Role.WHOLE, Role.STATE, Role.WHOLE, Role.WHOLE)
        step = functools.partial(self.steps.applied, impl, fn)
        return self._supplied(step, inputs=inputs, outputs=Role.WHOLE)

    def prediction(self, state: TrainState) -> tuple[Callable[[PyTree, Batch], PyTree], PyTree]:
        """Returns a pure function of `(arrays, batch)` that predicts on one device, and the arrays it takes."""
        return predicting(self.steps, self.given(), state, self.strategy.replica_axis)

    def module(self, state: TrainState) -> Any:
        """Returns the module with copies of the variables in `state`."""
        key = jax.random.fold_in(key_of(state), state.step)
        return self.steps.model.module(copy_arrays(state.variables), key)

    def training_metrics(self) -> Accumulator:
        """Returns an accumulator of the training metrics, which no step has specified yet."""
        return Accumulator(self._collections["training"])

    def describe_calls(self) -> str:
        """Returns in a few words how training steps are put into calls and what they are given."""
        return "open until the first fit" if self._last_calls is None else self._last_calls.describe()

    @property
    def _rows(self) -> Role:
        """What a batch and its outputs are to the devices: a unit is whole on each."""
        return Role.WHOLE if self.steps.units else Role.ROWS

    def _first_spec(self, batch: Batch | GlobalBatch, what: str) -> tuple[Any, int]:
        """Returns the shapes and dtypes of a first batch and its rows, refusing what no step can be made for."""
        spec = spec_of(batch)
        check_batch(spec)
        rows = 1 if self.steps.units else batch_size_of(spec)
        if not rows:
            raise ValueError(no_rows(what))
        return spec, rows

    def _feed(self, **options: Any) -> Feed:
        if self.steps.units:
            return UnitFeed(self.strategy)
        kind = Feed if self.strategy.processes == 1 else SharedFeed
        return kind(self.strategy, announced=self._announced, **options)

    def _predict(self, impl: str) -> Callable[..., Any]:
        roles = {"inputs": (Role.WHOLE, Role.STATE, self._rows, self._rows), "outputs": self._rows}
        step = functools.partial(self.steps.predict, impl)
        return self._kept(("predict", impl), lambda: self._supplied(step, **roles))

    def _inspect(self, kind: str, inspect: Callable[..., Traits], state: TrainState, batch: Batch) -> Traits:
        # A look at the step traces it; every evaluation of a fit asks for one.
        leaves, structure = jax.tree.flatten((state, batch))
        key = (kind, structure, *map(describe, leaves))
        if key not in self._traits:
            self._traits[key] = inspect(self.steps, self.strategy, self.given(), state, batch)
        return self._traits[key]

    def _prepare(
        self,
        kind: str,
        step: Callable[..., Any],
        compiled: Callable[..., Any],
        state: TrainState,
        traits: Traits,
        feed: Feed,
    ) -> Prepared:
        impl = key_impl(state)
        looks = _debugs_numbers()
        beside = frozenset(self._warned.on_host)
        key = (kind, impl, repr(signature(traits.outputs)), str(traits.weighted), looks, beside)
        if key not in self._prepared:
            accumulator = Accumulator(self._collections[kind], weighted=traits.weighted, beside=beside)
            accumulator.specify(**traits.outputs)
            pure = functools.partial(step, accumulator, impl)
            run = compiled(pure)
            calls = Calls(pure, run, self.strategy, ONE_BY_ONE if looks else self._settings)
            self._prepared[key] = run, accumulator, self.strategy.replicate(accumulator.empty()), calls
        run, accumulator, empty, calls = self._prepared[key]
        return Prepared(run, accumulator, empty, feed, calls)


def _train(
    train: Callable[..., Any],
    accumulator: Accumulator,
    impl: str,
    raw: Any,
    packed: Any,
    held: Any,
    handed: Any,
    mask: Any,
) -> Any:
    given, data = held
    return train(accumulator, impl, given, raw, packed, pick(data, handed), mask)


def _debugs_numbers() -> bool:
    """Says whether JAX was told to raise at the first number that is not finite (`jax.debug_nans`)."""
    config: Any = jax.config
    return bool(config.jax_debug_nans or config.jax_debug_infs)


def _strong(new: Any, old: Any) -> Any:
    """Returns `new` as an array that is strongly typed."""
    return new if is_key(old) else jnp.asarray(new, old.dtype)
