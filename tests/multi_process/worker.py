"""What each process of the tests runs: `python -m tests.multi_process.worker JOB INDEX COUNT PORT FOLDER`.

Owns the jobs; with COUNT 1 a job runs on four devices of one process. Results go to FOLDER.
"""

import json
import os
import pathlib
import pickle
import shutil
import sys

import flax
import flax.linen as nn
import jax
import numpy as np
import optax
from clu import metrics
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

import trainkit as tk
from tests.engine.starts import Told
from trainkit.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    Lambda,
    LogMetrics,
    Memory,
    OptunaPrune,
    Profile,
    Progress,
    StopAfter,
    Throughput,
)
from trainkit.metrics import collecting
from trainkit.parallel import Mesh

# Seconds after which a silent process counts as dead, and for which one that ends waits for the others.
HEARTBEAT, SHUTDOWN = 10, 5
# The last batch is one example: most devices, and one of two processes, have nothing but padding.
EXAMPLES, BATCH = 97, 24


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy
    numbers: collecting(["number"], lambda rows: np.sort(rows["number"]))


class MLP(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(16, name="first")(x))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(4, name="last")(x)


class Classifier(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["x"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"], "number": batch["number"]}

    def predict_step(self, model, batch, ctx):
        return {"logits": model(batch["x"]), "number": batch["number"]}


CASES = {
    "jit": {},
    # Statistics of a batch forbid padding: the last batch is held whole by every device.
    "batch statistics": {"model": MLP(norm=True)},
    "pmap": {"strategy": "pmap"},
    "fsdp, two batches a step": {"strategy": Mesh(fsdp=4), "accumulate": 2},
}


class Counted(tk.data.Source):
    """The batches of a source, and the examples that this process read of each, by epoch and index."""

    may_be_partial = True

    def __init__(self, source):
        self.source, self.read, self.num_examples = source, {}, source.num_examples
        self.steps_per_epoch = source.steps_per_epoch

    def batches(self, epoch, start=0):
        for index, batch in enumerate(self.source.batches(epoch, start), start):
            yield self._note((epoch, index), batch)

    def global_batches(self, epoch, start=0):
        for index, batch in enumerate(self.source.global_batches(epoch, start), start):
            place = epoch, index
            yield batch._replace(read=lambda *part, one=batch, at=place: self._note(at, one.read(*part)))

    def _note(self, place, rows):
        self.read.setdefault(place, []).append(rows["number"].tolist())
        return rows


def examples(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(EXAMPLES, 5)).astype(np.float32)
    label = (x[:, 0] > 0).astype(np.int32) + 2 * (x[:, 1] > 0).astype(np.int32)
    return {"x": x, "label": label, "number": np.arange(EXAMPLES, dtype=np.int32)}


def compare(index, folder):
    """Trains, evaluates and predicts in each case."""
    found = {}
    for name, options in CASES.items():
        trainer = Classifier(
            **{"model": MLP(), "tx": optax.adam(1e-2), **options},
            logdir=folder / f"logs-{index}" / name,
            callbacks=[
                EMA(0.9),
                EarlyStopping("eval/loss", patience=1, min_delta=0.5),
                Progress(stream=sys.stdout),
            ],
        )
        source = Counted(tk.data.Arrays(examples(), BATCH, shuffle=True, drop_last=False))
        result = trainer.fit(source, epochs=5, eval_data=tk.data.Arrays(examples(1), BATCH))
        predicted = trainer.predict(tk.data.Arrays(examples(), BATCH))
        if index == 0 and name == "jit":
            tk.save(folder / "state.msgpack", result.state)
        found[name] = {
            "params": trainer._strategy.fetch(result.state.params),
            "stats": trainer._strategy.fetch(result.state.batch_stats),
            "history": {key: result.history[key] for key in ("train/loss", "eval/loss", "eval/accuracy")},
            "stopped": (result.step, result.stopped_by),
            "evaluated": trainer.evaluate(tk.data.Arrays(examples(), BATCH), weights="live"),
            "predicted": predicted,
            "read": source.read,
            "rng": jax.random.key_data(result.state.rng),
            "ema": trainer._strategy.fetch(EMA.view(result.state).params),
        }
    with (folder / f"{index}.pickle").open("wb") as file:
        pickle.dump(found, file)


# Five batches a pass, two of them a step: the first part ends inside the second pass.
BROKEN_AT, RESUMED_TO, SAVE_EVERY = 4, 7, 2


def resume(index, folder):
    """Trains to the middle of a pass, goes on from there, and for comparison trains the whole in one go.

    One process alone goes on with a copy of what two saved.
    """
    found = {}
    if jax.process_count() > 1:
        train(folder / "run", BROKEN_AT)
        if index == 0:
            shutil.copytree(folder / "run", folder / "copy")
        multihost_utils.sync_global_devices("copied")
        found["resumed"] = train(folder / "run", RESUMED_TO)
        found["whole"] = train(folder / "whole", RESUMED_TO)
    else:
        found["resumed"] = train(folder / "copy", RESUMED_TO)
    with (folder / f"{index}.pickle").open("wb") as file:
        pickle.dump(found, file)


def train(logdir, steps):
    """Returns all that a run can be compared by after `steps`, and the examples that this process read."""
    trainer = Classifier(
        MLP(),
        optax.adam(1e-2),
        **CASES["fsdp, two batches a step"],
        logdir=logdir,
        callbacks=[
            EMA(0.9),
            EarlyStopping("eval/loss", patience=9),
            LogMetrics(tk.Every(steps=3)),
            Checkpoint(tk.Every(steps=SAVE_EVERY), keep=2, best=("eval/loss", "min")),
        ],
    )
    source = Counted(tk.data.Arrays(examples(), BATCH, shuffle=True, drop_last=False))
    evaluation = {"eval_data": tk.data.Arrays(examples(1), BATCH), "eval_every": tk.Every(steps=3)}
    result = trainer.fit(source, steps=steps, resume=True, **evaluation)
    state = trainer._strategy.fetch(result.state.replace(rng=jax.random.key_data(result.state.rng)))
    return {
        "state": (state.step, state.params, state.opt_state, state.hooks["ema"].params, state.rng),
        "history": dict(result.history),
        "stopped": (result.step, result.epoch, result.stopped_by),
        "read": source.read,
    }


def endless(index, folder):
    """Trains until something ends it; says that it trains."""

    def note(info):
        (folder / f"{index}.step").write_text(str(info.step))

    trainer = Classifier(MLP(), optax.sgd(1e-2), callbacks=[Lambda(every=tk.Every(steps=100), on_step=note)])
    result = trainer.fit(
        tk.data.Arrays(examples(), BATCH, shuffle=True),
        steps=10**9,
        eval_data=tk.data.Arrays(examples(1), BATCH),
        eval_every=tk.Every(seconds=0.01),
    )
    evaluated = [step for step, _ in result.history["eval/loss"]]
    (folder / f"{index}.json").write_text(json.dumps([result.step, result.stopped_by, evaluated]))


def failing(index, folder):
    """Trains until the data of the second process are broken."""

    def batches():
        for step in range(10**9):
            if index == 1 and step == 50:
                raise OSError("a disk of process 1 failed")
            yield jax.tree.map(lambda leaf: leaf[:BATCH], examples())

    Classifier(MLP(), optax.sgd(1e-2)).fit(batches, steps=10**9)


def kept(index, folder):
    """Says what was compiled, and what was found compiled, in three fits.

    In the first each process has a user's cache of its own, in the others they have the same.
    """
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    found = []
    for cache in (f"own-{index}", "shared", "shared"):
        os.environ["XDG_CACHE_HOME"] = str(folder / cache)
        with Told() as told:
            Classifier(MLP(), optax.sgd(1e-2)).fit(tk.data.Arrays(examples(), BATCH), steps=2)
        found.append([dict(told.missed), dict(told.hit)])
    (folder / f"{index}.json").write_text(json.dumps(found))


class Trial:
    """Is to be pruned at its third report."""

    reported = 0

    def report(self, value, step):
        self.reported += 1

    def should_prune(self):
        return self.reported >= 3


def control(index, folder):
    """Trains until the trial of the first process is pruned, and until the time is up; says what was logged."""
    trial = OptunaPrune(None if index else Trial(), "eval/loss")
    throughput = Throughput(tk.Every(epochs=1), items={"numbers": "number"})
    callbacks = [trial, throughput, Memory(tk.Every(epochs=1)), Profile(at=2, steps=2)]
    trainer = Classifier(MLP(), optax.sgd(1e-2), callbacks=callbacks, logdir=folder / "run")
    data = tk.data.Arrays(examples(), BATCH, shuffle=True, drop_last=False)
    result = trainer.fit(data, epochs=9, eval_data=tk.data.Arrays(examples(1), BATCH))
    rates = {
        name: result.history.last(f"throughput/{name}_per_second")
        / result.history.last("throughput/steps_per_second")
        for name in ("examples", "numbers")
    }
    timed = Classifier(MLP(), optax.sgd(1e-2), callbacks=[StopAfter(seconds=0.5)]).fit(data, steps=10**9)
    found = [result.step, result.stopped_by, trial.pruned, rates, timed.step, timed.stopped_by]
    (folder / f"{index}.json").write_text(json.dumps(found))


def main():
    job, index, count, port, folder = sys.argv[1], *map(int, sys.argv[2:5]), pathlib.Path(sys.argv[5])
    if count > 1:
        jax.distributed.initialize(
            f"localhost:{port}",
            count,
            index,
            initialization_timeout=60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    assert jax.device_count() == 4
    jobs = {
        "compare": compare,
        "resume": resume,
        "kept": kept,
        "endless": endless,
        "failing": failing,
        "control": control,
    }
    jobs[job](index, folder)


if __name__ == "__main__":
    main()
