"""The run that faults are done to: `python -m tests.faults.worker LOGDIR RESULT`.

Owns one run with everything that must survive in it; whoever starts it decides what happens to it. It says on
its standard output where it is, a line at a time, and leaves what two runs are compared by in RESULT.
"""

import json
import os
import pathlib
import sys

import flax
import jax
import numpy as np
import optax
from clu import metrics
from flax import linen as nn

import trainkit as tk

STEPS_PER_EPOCH, EPOCHS = 8, 3
STEPS = STEPS_PER_EPOCH * EPOCHS


class Net(nn.Module):
    """Draws random numbers and keeps statistics."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(6)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(x))


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")


class Trainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["x"], train=ctx.train)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]), {}


class Says(tk.callbacks.Callback):
    """Tells where the run is; a write to a pipe survives the process."""

    def on_fit_start(self, info):
        say(f"fit {info.step}")

    def on_step(self, info):
        say(f"train {info.step}")

    def on_eval_start(self, info):
        say(f"evaluate {info.step}")

    def on_fit_end(self, info):
        say(f"close {info.step}")


def say(what):
    os.write(sys.stdout.fileno(), f"{what}\n".encode())


def arrays(size, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "label": (x @ rng.normal(size=(4, 3))).argmax(-1).astype(np.int32)}


def make_trainer(logdir, *extra, every=2):
    """Returns a trainer with a callback of each kind that remembers anything."""
    callbacks = [
        tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
        tk.callbacks.EMA(0.9),
        tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=30),
        tk.callbacks.Checkpoint(tk.Every(steps=every), keep=2, best=("eval/loss", "min")),
        *extra,
    ]
    return Trainer(Net(), optax.adam(1e-2), callbacks=callbacks, logdir=logdir)


def fit(trainer, epochs=EPOCHS):
    """Trains to the end, from wherever an earlier process came to."""
    data = tk.data.Arrays(arrays(STEPS_PER_EPOCH * 8 + 3, 0), 8, shuffle=True, seed=3)
    return trainer.fit(
        data,
        epochs=epochs,
        eval_data=tk.data.Arrays(arrays(16, 1), 8),
        eval_every=tk.Every(steps=5),
        resume=True,
    )


def outcome(result):
    """Returns all that two runs are compared by, as arrays by name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.state):
        leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    found["history"] = np.array(json.dumps(dict(result.history)))
    found["ended"] = np.array([result.step, result.epoch])
    return found


def main():
    logdir, target = map(pathlib.Path, sys.argv[1:])
    say("compile 0")
    result = fit(make_trainer(logdir, Says()))
    say(f"result {result.step}")
    np.savez(target, **outcome(result))
    say(f"done {result.stopped_by}")


if __name__ == "__main__":
    main()
