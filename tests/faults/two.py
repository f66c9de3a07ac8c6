"""What each of two processes runs: `python -m tests.faults.two INDEX PORT FOLDER`.

Three fits: one that nothing happens to, one in which the second process alone gets SIGTERM, and one that goes on
with that. Owns these fits; the test starts the processes and compares what they leave in FOLDER.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np

import trainkit as tk
from tests.helpers.weight import numbers, trainer, weight
from tests.multi_process.worker import HEARTBEAT, SHUTDOWN
from trainkit.callbacks import Checkpoint, Lambda, LogMetrics

# Processes agree on signals every 32 steps.
PER_EPOCH, EPOCHS, SIGNALLED, STOPPED = 12, 6, 40, 64


def fit(logdir, *extra):
    """Trains to the end or from wherever it stands; returns what two runs are compared by."""
    made = trainer(
        *extra, LogMetrics(tk.Every(steps=5)), Checkpoint(tk.Every(steps=25), keep=2), logdir=logdir
    )
    rows = np.random.default_rng(0).normal(size=4 * PER_EPOCH).astype(np.float32)
    result = made.fit(
        tk.data.Arrays(rows, 4, shuffle=True, seed=1),
        epochs=EPOCHS,
        eval_data=numbers(7),
        eval_every=tk.Every(steps=30),
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

    def signal_one(info):
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    found = {"whole": fit(folder / "whole")}
    found["broken off"] = fit(folder / "logs", Lambda(every=tk.At(steps=(SIGNALLED,)), on_step=signal_one))
    found["steps"] = [info.step for info in tk.checkpoint.verify(folder / "logs") if not info.problems]
    found["resumed"] = fit(folder / "logs", Lambda())
    (folder / f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
