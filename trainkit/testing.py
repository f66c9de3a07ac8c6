"""Proofs for what people plug in: strategies, callbacks, writers and sources of their own.

Each function runs what it is given and raises an `AssertionError` that says which promise was broken. Owns what
is promised; needs no test runner.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainkit._context import StepContext
from trainkit._promises import close, equal, holds, promised, same_batches
from trainkit._trainer import Trainer
from trainkit._tree import differences, signature
from trainkit._typing import Batch, Outputs, PyTree
from trainkit._when import Every
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._lambda import Lambda
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.data._arrays import Arrays
from trainkit.data._batch import batch_size_of, check_batch
from trainkit.data._source import Source, as_source
from trainkit.hooks._hook import StepHook
from trainkit.parallel._strategy import Strategy
from trainkit.writers._writer import MetricWriter

__all__ = ["check_callback", "check_source", "check_strategy", "check_writer"]

_FEATURES, _CLASSES, _STEPS = 5, 3, 6
# Batches read of a source that may be endless.
_MOST = 32


# Strategies ---------------------------------------------------------------------------------------------------


def check_strategy(strategy: Strategy) -> None:
    """Proves that a strategy trains, evaluates and predicts as one device does.

    A small model is trained for a few steps with padded batches, and one with `nn.BatchNorm(axis_name="batch")`,
    and compared with a loop written by hand; then evaluation and prediction, for sizes that divide nothing.

    Args:
        strategy: on the devices it is to be used on.

    Raises:
        AssertionError: a promise is broken; says which, and by how much.

    Example:
        >>> from trainkit.parallel import Mesh
        >>> check_strategy(Mesh())
    """
    full = 2 * strategy.shards
    _check_training(strategy, _Net(norm=False), [full, full, full - 1])
    trained = _check_training(strategy, _Net(norm=True), [full, full])
    for size in (1, 3 * full + 1):
        _check_evaluation(trained, size, full)


class _Net(nn.Module):
    """An MLP that takes a batch or one example."""

    norm: bool
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(8)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(_CLASSES)(nn.relu(x))


class _NetTrainer(Trainer):
    def loss(self, model: Any, batch: Batch, ctx: StepContext) -> tuple[jax.Array, Outputs]:
        logits = model(batch["x"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        # What pads may hold anything, and must do no harm.
        return jnp.where(ctx.mask, losses, jnp.nan), {"logits": logits}


def _examples(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, _CLASSES, rows).astype(np.int32)
    return {"x": (rng.normal(size=(rows, _FEATURES)) + y[:, None]).astype(np.float32), "y": y}


def _check_training(strategy: Strategy, model: _Net, sizes: list[int]) -> Trainer:
    data = [_examples(rows, seed) for seed, rows in enumerate(sizes)]
    log, compiled = LogMetrics(every=Every(steps=1)), []
    with _compilations() as programs:
        counter = Lambda(on_step=lambda info: compiled.append(len(programs)))
        trainer = _NetTrainer(
            model, optax.sgd(0.1, momentum=0.9), strategy=strategy, callbacks=[log, counter]
        )
        with promised("a strategy trains a model with a loss per example"):
            result = trainer.fit(data, steps=_STEPS)
    params, stats, losses = _by_hand(model.clone(axis_name=None), data)
    logged = [value for _, value in result.history["train/loss"]]
    state = strategy.fetch((result.state.params, dict(result.state.batch_stats)))
    close("the losses of training are those of one device", logged, losses)
    close("the parameters after training are those of one device", state[0], params)
    close("the batch statistics after training are those of one device", state[1], stats)
    again = compiled[-1] - compiled[0]
    holds(
        not again,
        f"nothing compiles after the first step, also where batches are padded: {again} programs did",
    )
    return trainer


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """Yields a list that gets an entry for each program that XLA compiles."""
    programs: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def _by_hand(model: _Net, data: list[dict[str, np.ndarray]]) -> tuple[PyTree, PyTree, list[float]]:
    """Returns parameters, batch statistics and losses of a plain loop on one device."""
    tx = optax.sgd(0.1, momentum=0.9)
    init = jax.jit(functools.partial(model.init, train=True))
    variables = init(jax.random.split(jax.random.key(0))[0], data[0]["x"])
    params, stats = variables["params"], variables.get("batch_stats", {})
    opt_state, losses = tx.init(params), []

    @jax.jit
    def step(params: PyTree, stats: PyTree, opt_state: PyTree, batch: Batch) -> tuple[Any, ...]:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            collections = {"params": params, "batch_stats": stats}
            logits, updated = model.apply(collections, batch["x"], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), updated.get("batch_stats", {}), opt_state, value

    for index in range(_STEPS):
        params, stats, opt_state, value = step(params, stats, opt_state, data[index % len(data)])
        losses.append(float(value))
    return jax.device_get(params), jax.device_get(stats), losses


def _check_evaluation(trainer: Trainer, size: int, batch_size: int) -> None:
    data = _examples(size, seed=size)
    source = Arrays(data, batch_size=batch_size)
    before = trainer._engine.steps.traces.count("evaluation")
    with promised(f"a strategy evaluates {size} examples in batches of {batch_size}"):
        got, predicted = trainer.evaluate(source), trainer.predict(source)
    variables = trainer._engine.strategy.fetch(trainer.state.variables)
    apply_fn = _Net(norm=True, axis_name=None).apply
    logits = np.asarray(apply_fn(variables, data["x"], train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_p[np.arange(size), data["y"]].mean()
    close(f"evaluation of {size} examples is exact: each counts once", got["loss"], expected)
    close(f"prediction returns each of {size} examples once, in order", predicted["logits"], logits)
    compiled = trainer._engine.steps.traces.count("evaluation") - before
    holds(compiled <= 1, f"the evaluation of one source compiles at most once: {compiled} times")


# Callbacks ----------------------------------------------------------------------------------------------------


def check_callback(make: Callable[[], Callback]) -> None:
    """Proves that a callback runs, remembers and can be used again.

    It serves two fits of a small classifier that logs `train/loss` and `eval/loss`, whose rate is in
    `optax.inject_hyperparams`; then its `state_dict` goes through msgpack into a new one, and back.

    Args:
        make: returns a new callback.

    Raises:
        AssertionError: a promise is broken; says which.

    Example:
        >>> from trainkit.callbacks import EarlyStopping
        >>> check_callback(lambda: EarlyStopping("eval/loss", mode="min", patience=3))
    """
    callback = make()
    holds(isinstance(callback, Callback), f"make() returns a Callback: {type(callback).__name__}")
    _check_begun_only(make())
    trainer = _trainer(callback)
    for number in ("a first", "a second"):
        with promised(f"a callback serves {number} fit"):
            _fit(trainer)
    _check_state_dict(callback, make)


class _Failing(Callback):
    """Ends a fit in its `on_fit_start`, after which only `on_exception` and `close` of the others are called."""

    class Raised(Exception):
        pass

    def on_fit_start(self, info: Any) -> None:
        raise self.Raised


def _trainer(*callbacks: Callback) -> Trainer:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return _NetTrainer(_Net(norm=False), tx, callbacks=callbacks)


def _fit(trainer: Trainer) -> None:
    data = [_examples(4, seed) for seed in range(3)]
    trainer.fit(data, epochs=2, eval_data=data)


def _check_begun_only(callback: Callback) -> None:
    try:
        _fit(_trainer(callback, _Failing()))
    except _Failing.Raised as error:
        # What on_exception and close raise after the first exception is attached to it.
        raised = " ".join(getattr(error, "__notes__", ()))
    else:
        raised = "the fit did not end"
    holds(not raised, f"close works when nothing but on_fit_start was called: {raised}")


def _check_state_dict(callback: Callback, make: Callable[[], Callback]) -> None:
    state = callback.state_dict()
    holds(isinstance(state, dict), f"state_dict returns a dict: {type(state).__name__}")
    with promised("state_dict holds JSON values and arrays by str, which a checkpoint can write"):
        restored: Any = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(state))
    other = make()
    with promised("load_state_dict takes what state_dict returned"):
        other.load_state_dict(restored)
    equal("a new callback that loaded a state_dict returns the same", other.state_dict(), state)
    with promised("a callback that loaded a state_dict serves a fit"):
        _fit(_trainer(other))
    _check_hook(callback.step_hook(), make().step_hook())


def _check_hook(hook: StepHook | None, other: StepHook | None) -> None:
    names = [None if one is None else one.name for one in (hook, other)]
    holds(names[0] == names[1], f"step_hook names one place in state.hooks, whoever made it: {names}")


# Writers ------------------------------------------------------------------------------------------------------


_CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "write_scalars": ({"loss": 0.5, "rate": np.float32(0.1)}, {}),
    "write_summaries": ({"raw": np.arange(6.0).reshape(2, 3)}, {"metadata": None}),
    "write_images": ({"image": np.zeros((2, 4, 5, 3), np.uint8)}, {}),
    "write_videos": ({"video": np.zeros((1, 2, 4, 5, 3), np.uint8)}, {}),
    "write_audios": ({"audio": np.zeros((1, 16, 2), np.float32)}, {"sample_rate": 8000}),
    "write_texts": ({"text": "*hello*"}, {}),
    "write_histograms": ({"weights": np.arange(9.0)}, {"num_buckets": {"weights": 3}}),
    "write_pointcloud": (
        {"cloud": np.zeros((7, 3))},
        {"point_colors": {"cloud": np.zeros((7, 3), np.uint8)}},
    ),
}


def check_writer(make: Callable[[], MetricWriter]) -> None:
    """Proves that a writer takes every call of the interface, and leaves its end to its owner.

    A kind of value that it does not do may raise `NotImplementedError`, scalars excepted.

    Args:
        make: returns a new writer.

    Raises:
        AssertionError: a promise is broken; says which.

    Example:
        >>> from trainkit.writers import NullWriter
        >>> check_writer(NullWriter)
    """
    writer = make()
    with promised("write_hparams takes nested values"):
        _call(writer, "write_hparams", {"rate": 0.1, "model": {"width": 8}})
    for step, (name, (values, keywords)) in enumerate(_CALLS.items(), start=1):
        with promised(f"{name} takes (step, values) with the keywords {sorted(keywords)}"):
            _call(writer, name, step, values, **keywords)
        with promised(f"{name} takes an empty mapping"):
            _call(writer, name, step, {}, **({"sample_rate": 8000} if name == "write_audios" else {}))
    with promised("write_scalars takes arrays of a device, NumPy numbers and NaN"):
        _call(writer, "write_scalars", np.int64(20), {"a": jnp.float32(1), "b": jnp.ones((1,)), "c": np.nan})
    with promised("flush may be called between writes"):
        _call(writer, "flush")
        _call(writer, "write_scalars", 21, {"loss": 0.25})
    with promised("close may be called twice"):
        _call(writer, "close")
        _call(writer, "close")
    _check_in_a_fit(make())


def _check_in_a_fit(writer: MetricWriter) -> None:
    trainer = _NetTrainer(_Net(norm=False), optax.sgd(0.1), writers=[writer])
    with promised("a writer serves two fits, and can be written to after them"):
        for _ in range(2):
            trainer.fit([_examples(4, 0)], epochs=1)
        _call(writer, "write_scalars", 100, {"loss": 0.5})
    writer.close()


def _call(writer: MetricWriter, method: str, *args: Any, **kwargs: Any) -> None:
    try:
        returned = getattr(writer, method)(*args, **kwargs)
    except NotImplementedError:
        if method in ("write_scalars", "flush", "close"):
            raise
        return
    holds(returned is None, f"{method} returns nothing: {returned!r}")


# Sources ------------------------------------------------------------------------------------------------------


def check_source(make: Callable[[], Source]) -> None:
    """Proves that a source yields what it says, and the same from every position.

    At most 32 batches of an epoch are read.

    Args:
        make: returns a new source, or other data that a trainer takes; two of them hold the same.

    Raises:
        AssertionError: a promise is broken; says which, and at which epoch and batch.

    Example:
        >>> import numpy as np
        >>> check_source(lambda: Arrays({"x": np.arange(10)}, batch_size=4, shuffle=True))
    """
    source = as_source(make())
    epochs = []
    for epoch in (0, 1):
        with promised(f"batches({epoch}) yields batches of numbers with equal leading sizes"):
            epochs.append(_read(source, epoch))
        _check_facts(source, epoch, epochs[-1])
    other = as_source(make())
    for epoch, batches in enumerate(epochs):
        same_batches(f"a source made anew yields the same epoch {epoch}", _read(other, epoch), batches)
        for start in range(len(batches) + 1):
            promise = f"batches({epoch}, start={start}) goes on as batches({epoch}) does from there"
            with promised(promise):
                rest = list(itertools.islice(source.batches(epoch, start), len(batches) - start))
            same_batches(promise, rest, batches[start:])
    same_batches("epoch 0 is the same when it is asked for again", _read(source, 0), epochs[0])
    _check_together(source, epochs[0])
    _check_refused(source)


def _read(source: Source, epoch: int) -> list[Batch]:
    batches = list(itertools.islice(source.batches(epoch), _MOST))
    for batch in batches:
        check_batch(batch)
        batch_size_of(batch)
    return batches


def _check_facts(source: Source, epoch: int, batches: list[Batch]) -> None:
    sizes = [batch_size_of(batch) for batch in batches]
    holds(bool(sizes), f"an epoch yields at least one batch: epoch {epoch} yields none")
    holds(max(sizes) == sizes[0], f"the first batch is the largest: epoch {epoch} has the sizes {sizes}")
    if not source.may_be_partial:
        holds(min(sizes) == sizes[0], f"with may_be_partial=False batches are of one size: {sizes}")
    if source.batch_size is not None:
        holds(
            sizes[0] == source.batch_size,
            f"the first batch has batch_size={source.batch_size} rows: {sizes[0]}",
        )
    rows = [{name: value.split("[")[0] for name, value in signature(batch).items()} for batch in batches]
    for index, row in enumerate(rows):
        changed = differences(rows[0], row)
        holds(not changed, f"every batch has the same leaves and dtypes: batch {index}: {'; '.join(changed)}")
    if len(batches) == _MOST:
        return
    steps, examples = source.steps_per_epoch, source.num_examples
    holds(steps in (None, len(sizes)), f"steps_per_epoch={steps} is how many there are: {len(sizes)}")
    holds(examples in (None, sum(sizes)), f"num_examples={examples} is how many there are: {sum(sizes)}")


def _check_together(source: Source, batches: list[Batch]) -> None:
    # Evaluation may read a source in the middle of training on it.
    first, second = source.batches(0), source.batches(0)
    mixed = [batch for pair in zip(first, second, strict=False) for batch in pair][: 2 * len(batches)]
    expected = [batch for batch in batches for _ in range(2)]
    same_batches(
        "two iterators of one source do not disturb each other",
        mixed[: len(expected)],
        expected[: len(mixed)],
    )


def _check_refused(source: Source) -> None:
    for epoch, start in ((-1, 0), (0, -1)):
        try:
            next(iter(source.batches(epoch, start)), None)
        except ValueError:
            continue
        holds(False, f"batches({epoch}, {start}) is refused with a ValueError: it was taken")
