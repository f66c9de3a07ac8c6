"""The proof of a strategy. Owns what is promised of one."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from trainkit._core.cadence import Every
from trainkit._core.typing import Batch, PyTree
from trainkit._trainer.trainer import Trainer
from trainkit.callbacks._lambda import Lambda
from trainkit.callbacks._log_metrics import LogMetrics
from trainkit.data._arrays import Arrays
from trainkit.parallel._strategy import Strategy
from trainkit.testing._classifier import Net, NetTrainer, examples
from trainkit.testing._promises import close, holds, promised

_STEPS = 6


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
    _check_training(strategy, Net(norm=False), [full, full, full - 1])
    trained = _check_training(strategy, Net(norm=True), [full, full])
    for size in (1, 3 * full + 1):
        _check_evaluation(trained, size, full)


def _check_training(strategy: Strategy, model: Net, sizes: list[int]) -> Trainer:
    data = [examples(rows, seed) for seed, rows in enumerate(sizes)]
    log, compiled = LogMetrics(every=Every(steps=1)), []
    with _compilations() as programs:
        counter = Lambda(on_step=lambda info: compiled.append(len(programs)))
        trainer = NetTrainer(model, optax.sgd(0.1, momentum=0.9), strategy=strategy, callbacks=[log, counter])
        with promised("a strategy trains a model with a loss per example"):
            result = trainer.fit(data, steps=_STEPS)
    params, stats, losses = _by_hand(model.clone(axis_name=None), data)
    logged = [value for _, value in result.history["train/loss"]]
    state = strategy.fetch((result.state.params, dict(result.state.batch_stats)))
    close("the losses of training are those of one device", logged, losses)
    close("the parameters after training are those of one device", state[0], params)
    close("the batch statistics after training are those of one device", state[1], stats)
    # The first padded batch is looked at by a program of its own.
    again = compiled[-1] - compiled[0] - (min(sizes) < max(sizes))
    holds(
        again <= 0,
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


def _by_hand(model: Net, data: list[dict[str, np.ndarray]]) -> tuple[PyTree, PyTree, list[float]]:
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
    data = examples(size, seed=size)
    source = Arrays(data, batch_size=batch_size)
    before = trainer._engine.steps.traces.count("evaluation")
    with promised(f"a strategy evaluates {size} examples in batches of {batch_size}"):
        got, predicted = trainer.evaluate(source), trainer.predict(source)
    variables = trainer._engine.strategy.fetch(trainer.state.variables)
    apply_fn = Net(norm=True, axis_name=None).apply
    logits = np.asarray(apply_fn(variables, data["x"], train=False), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_p[np.arange(size), data["y"]].mean()
    close(f"evaluation of {size} examples is exact: each counts once", got["loss"], expected)
    close(f"prediction returns each of {size} examples once, in order", predicted["logits"], logits)
    compiled = trainer._engine.steps.traces.count("evaluation") - before
    holds(compiled <= 1, f"the evaluation of one source compiles at most once: {compiled} times")
