"""A run that was broken off and resumed cannot be told from one that was not: bit for bit, log line for log line."""

import os
import signal

import flax
import jax
import numpy as np
import optax
import pytest
from clu import metrics
from flax import linen as nn

import trainkit as tk
from tests.helpers.runs import scalars_of

STEPS_PER_EPOCH, EPOCHS = 8, 5
STEPS = STEPS_PER_EPOCH * EPOCHS


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(3)(x)


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class Trainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        x = batch["x"]
        if ctx.train:  # augmentation by key
            x = x + 0.1 * jax.random.normal(jax.random.fold_in(ctx.rng, 7), x.shape)
        logits = model(x, train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


class Seen(tk.data.Arrays):
    """Remembers which examples were asked for, in order."""

    def __init__(self, log, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._log = log

    def batches(self, epoch, start=0):
        for batch in super().batches(epoch, start):
            self._log.append(batch["id"].tolist())
            yield batch


class Tally(tk.callbacks.Callback):
    """Counts its hooks, remembers the count, and writes at the end of every epoch."""

    def __init__(self):
        self.counts = {}

    def _count(self, hook):
        self.counts[hook] = self.counts.get(hook, 0) + 1

    def on_epoch_start(self, info):
        self._count("epoch_start")

    def on_step(self, info):
        self._count("step")

    def on_eval_end(self, info):
        self._count("eval_end")

    def on_epoch_end(self, info):
        self._count("epoch_end")
        info.writer.write_scalars(info.step, {"tally/epochs": self.counts["epoch_end"]})

    def state_dict(self):
        return {"counts": dict(self.counts), "array": np.arange(3, dtype=np.int16)}

    def load_state_dict(self, state):
        self.counts = dict(state["counts"])
        np.testing.assert_array_equal(state["array"], np.arange(3, dtype=np.int16))


class BreakOff(tk.callbacks.Callback):
    """Sends the process a signal, or raises, at a step; `during` an evaluation or after the step."""

    def __init__(self, step, during="step", how="SIGTERM"):
        self._step, self._during, self._how = step, during, how

    def _act(self, info, moment):
        if info.step == self._step and moment == self._during:
            if self._how == "raise":
                raise RuntimeError("broken off")
            os.kill(os.getpid(), signal.Signals[self._how])

    def on_step(self, info):
        self._act(info, "step")

    def on_eval_start(self, info):
        self._act(info, "evaluation")


def arrays(size, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "label": (x @ rng.normal(size=(4, 3))).argmax(-1).astype(np.int32), "id": np.arange(size)}


class Run:
    """One process's worth of a run: a trainer with everything plugged in."""

    def __init__(self, logdir, *extra, accumulate=1, every=None, strategy="jit"):
        self.stopping = tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=30, restore_best=True)
        self.plateau = tk.callbacks.ReduceOnPlateau("other/loss", mode="min", patience=1, factor=0.5)
        self.tally, self.seen, self.accumulate = Tally(), [], accumulate
        schedule = optax.cosine_decay_schedule(1e-2, STEPS)
        tx = optax.inject_hyperparams(
            lambda learning_rate: optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.adam(lambda step: learning_rate * schedule(step)),
            )
        )(learning_rate=1.0)
        callbacks = [
            tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
            tk.callbacks.LearningRate(every=tk.Every(steps=4)),
            tk.callbacks.EMA(0.9),
            self.stopping,
            self.plateau,
            self.tally,
            tk.callbacks.Checkpoint(every or tk.Every(steps=5), keep=2, best=("eval/loss", "min")),
            *extra,
        ]
        self.trainer = Trainer(
            Net(), tx, callbacks=callbacks, logdir=logdir, accumulate=accumulate, strategy=strategy
        )

    def sharing(self, engines):
        """Takes the compiled steps of the run before, of which there are many: they are the same programs."""
        vars(self.trainer)["_engine"] = engines.setdefault(self.accumulate, self.trainer._engine)
        return self

    def fit(self, epochs=EPOCHS, eval_every=None):
        data = Seen(self.seen, arrays(68 * self.accumulate, 0), 8, shuffle=True, seed=3)
        sources = {
            "eval": tk.data.Arrays(arrays(30, 1), 8),
            "other": tk.data.Arrays(arrays(20, 2), 20),
        }
        return self.trainer.fit(
            data, epochs=epochs, eval_data=sources, eval_every=eval_every or tk.Every(steps=6), resume=True
        )


def everything(run, result):
    """Returns all that two runs are compared by."""
    leaves = {}
    for name, leaf in jax.tree_util.tree_leaves_with_path(result.state):
        leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        leaves[jax.tree_util.keystr(name)] = np.asarray(leaf)
    memories = {
        "stopping": {k: v for k, v in run.stopping.state_dict().items() if k != "best_state"},
        "plateau": run.plateau.state_dict(),
        "tally": run.tally.counts,
    }
    return leaves, dict(result.history), memories, (result.step, result.epoch, result.stopped_by)


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    for name, leaf in a[0].items():
        np.testing.assert_array_equal(leaf, b[0][name], err_msg=name)
    assert a[1:] == b[1:]


ENGINES = {}
"""Compiled steps by the number of batches that make a step."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never broken off, for each number of batches that make a step."""
    runs = {}

    def run(accumulate):
        if accumulate not in runs:
            logdir = tmp_path_factory.mktemp("whole")
            one = Run(logdir, accumulate=accumulate).sharing(ENGINES)
            result = one.fit()
            runs[accumulate] = everything(one, result), scalars_of(logdir), one.seen
        return runs[accumulate]

    return run


def broken_and_resumed(logdir, break_off, accumulate=1):
    first = Run(logdir, break_off, accumulate=accumulate).sharing(ENGINES)
    if break_off._how == "raise":
        with pytest.raises(RuntimeError, match="broken off"):
            first.fit()
    else:
        assert first.fit().stopped_by == break_off._how
    second = Run(logdir, accumulate=accumulate).sharing(ENGINES)
    return first, second, second.fit()


# Around saves, evaluations and ends of passes; the others take minutes.
QUICK = (1, 2, 5, 6, 7, 8, 9, 12, 24, 30, 39, 40)


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=() if step in QUICK else pytest.mark.slow) for step in range(1, STEPS + 1)],
)
def test_a_run_broken_off_by_sigterm_after_any_step_ends_as_if_it_was_not(tmp_path, whole, step):
    expected, logs, seen = whole(1)
    first, second, result = broken_and_resumed(tmp_path, BreakOff(step))
    assert_same(everything(second, result), expected)
    assert scalars_of(tmp_path) == logs
    # The loop looks one batch ahead; those of the steps done are the same, in the same order.
    assert first.seen[:step] + second.seen[: STEPS - step] == seen[:STEPS]


@pytest.mark.parametrize("step", [3, 8, 9, 17, 24, 39])
def test_a_run_that_died_goes_on_from_its_last_checkpoint_and_ends_the_same(tmp_path, whole, step):
    expected, logs, _ = whole(1)
    _, second, result = broken_and_resumed(tmp_path, BreakOff(step, how="raise"))
    assert_same(everything(second, result), expected)
    assert scalars_of(tmp_path) == logs


@pytest.mark.parametrize("step", [6, 24, 36])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "raise"])
def test_an_evaluation_broken_off_is_done_by_the_run_that_goes_on(tmp_path, whole, step, how):
    expected, logs, _ = whole(1)
    _, second, result = broken_and_resumed(tmp_path, BreakOff(step, during="evaluation", how=how))
    assert_same(everything(second, result), expected)
    assert scalars_of(tmp_path) == logs


@pytest.mark.parametrize("step", [1, 6, 8, 19])
def test_accumulated_steps_resume_the_same(tmp_path, whole, step):
    expected, logs, _ = whole(2)
    _, second, result = broken_and_resumed(tmp_path, BreakOff(step), accumulate=2)
    assert_same(everything(second, result), expected)
    assert scalars_of(tmp_path) == logs


def test_a_run_broken_off_again_and_again_ends_the_same(tmp_path, whole):
    expected, logs, _ = whole(1)
    for step in (2, 6, 8, 13, 24, 30, 40):
        run = Run(tmp_path, BreakOff(step)).sharing(ENGINES)
        result = run.fit()
    assert result.stopped_by == "SIGTERM"
    run = Run(tmp_path).sharing(ENGINES)
    assert_same(everything(run, run.fit()), expected)
    assert scalars_of(tmp_path) == logs


def test_a_finished_run_started_again_returns_what_it_returned(tmp_path, whole):
    expected, logs, _ = whole(1)
    Run(tmp_path).sharing(ENGINES).fit()
    again = Run(tmp_path).sharing(ENGINES)
    assert_same(everything(again, again.fit()), expected)
    assert scalars_of(tmp_path) == logs


def test_a_finished_run_goes_on_to_more_epochs_as_one_that_was_asked_for_them_at_once(tmp_path, whole):
    expected, logs, _ = whole(1)
    Run(tmp_path).sharing(ENGINES).fit(epochs=3)
    longer = Run(tmp_path).sharing(ENGINES)
    assert_same(everything(longer, longer.fit()), expected)
    assert scalars_of(tmp_path) == logs
