"""What each of two processes runs: `python -m tests.faults.two INDEX PORT FOLDER`.

Three fits: one that nothing happens to, one in which the second process alone gets SIGTERM, and one that goes on
with that. Owns these fits; the test starts the processes and compares what they leave in FOLDER.
"""

import os
import pathlib
import pickle
import signal
import sys

import jax

import trainkit as tk
from tests.faults import worker
from tests.multi_process.worker import HEARTBEAT, SHUTDOWN
from trainkit.callbacks import Lambda

# Processes agree on signals every 32 steps.
EPOCHS, SIGNALLED, STOPPED = 9, 40, 64


def fit(logdir, *extra):
    """Trains to the end or from wherever it stands; returns all that two runs are compared by."""
    trainer = worker.make_trainer(logdir, *extra, every=25)
    result = worker.fit(trainer, epochs=EPOCHS)
    return worker.outcome(result), result.stopped_by


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
    found["steps"] = [info.step for info in tk.checkpoint.list(folder / "logs")]
    found["resumed"] = fit(folder / "logs", Lambda())
    with (folder / f"{index}.pickle").open("wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main()
