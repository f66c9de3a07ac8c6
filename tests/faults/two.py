"""What each of two processes runs: `python -m tests.faults.two INDEX PORT FOLDER`.

One fit that nothing happens to, and others in which the second process alone gets a signal: SIGTERM between steps, in
an evaluation and after the processes met for the last time, each with one that goes on with it; and SIGUSR1. Owns these
fits; the test starts the processes and compares what they leave in FOLDER.
"""

import json
import math
import os
import pathlib
import signal
import sys

import jax
import numpy as np

import trainkit as tk
from tests.helpers.weight import numbers, trainer, weight
from tests.multi_process.worker import HEARTBEAT, SHUTDOWN
from trainkit._loop import meetings
from trainkit.callbacks import Checkpoint, Lambda, LogMetrics

# Processes agree on signals every 32 steps, and every 32 batches of an evaluation.
PER_EPOCH, EPOCHS, EVALUATED, BATCHES, SIGNALLED, STOPPED = 12, 6, 30, 40, 61, 64


def fit(logdir, *extra):
    """Trains to the end or from wherever it stands; returns what two runs are compared by."""
    made = trainer(
        *extra, LogMetrics(tk.Every(steps=5)), Checkpoint(tk.Every(steps=25), keep=2), logdir=logdir
    )
    rows = np.random.default_rng(0).normal(size=4 * PER_EPOCH).astype(np.float32)
    result = made.fit(
        tk.data.Arrays(rows, 4, shuffle=True, seed=1),
        epochs=EPOCHS,
        eval_data=numbers(*[7] * BATCHES),
        eval_every=tk.Every(steps=EVALUATED),
        resume=True,
    )
    return [weight(result.state), result.step, result.epoch, result.stopped_by, dict(result.history)]


def main():
    index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    jax.distributed.initialize(
        f"localhost:{port}",
        2,
        index,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )

    def one(name):
        def send(info):
            if index == 1 and name is not None:
                os.kill(os.getpid(), signal.Signals[name])

        return send

    def at(step, name):
        return Lambda(every=tk.At(steps=(step,)), on_step=one(name))

    # A callback that is due looks at the metrics, so that their float32 sums begin anew: there is one in each run.
    found = {"whole": fit(folder / "whole", at(SIGNALLED, None))}
    for name, sender in {
        "between steps": at(SIGNALLED, "SIGTERM"),
        "between slow steps": at(SIGNALLED, "SIGTERM"),
        "in an evaluation": Lambda(
            every=tk.At(steps=(SIGNALLED,)), on_eval_start=one("SIGTERM"), on_step=one(None)
        ),
        "too late": Lambda(every=tk.At(steps=(SIGNALLED,)), on_fit_end=one("SIGHUP"), on_step=one(None)),
        "saved": at(SIGNALLED, "SIGUSR1"),
    }.items():
        # However slow the machine, they meet where it says above, or after every step.
        meetings._SECONDS = 0.0 if name == "between slow steps" else math.inf
        found[name] = [fit(folder / name, sender)]
        found[name].append([info.step for info in tk.checkpoint.verify(folder / name) if not info.problems])
        found[name].append(fit(folder / name, at(SIGNALLED, None)))
    (folder / f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
