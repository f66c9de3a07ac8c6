"""Trains a small network on scikit-learn's digits with any number of processes, one per host.

python examples/multihost/train.py                      one process on all devices of this machine
srun python examples/multihost/train.py                 as many as SLURM (or Open MPI) starts
python examples/multihost/train.py --coordinator host:port --num-processes 2 --process-id 0     by hand

Ends with 0 when all is trained, and with 75 when a signal ended it before: all is saved then, and the same command with
--resume does the rest.
"""

import argparse
import os
import pathlib
import signal
import sys

import flax
import jax
import numpy as np
import optax
from clu import metrics
from flax import linen as nn
from sklearn.datasets import load_digits

import trainkit as tk

# Set in each process by `srun` and `mpirun`; JAX reads the rest of what it needs from their variables.
LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class DigitsTrainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


def join(args: argparse.Namespace) -> None:
    """Makes this process one of several, where it was started as one; before anything touches a device."""
    by_hand = args.coordinator is not None
    if by_hand or any(name in os.environ for name in LAUNCHERS):
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            # How long the others go on when a process was killed, and when one ended with an exception.
            heartbeat_timeout_seconds=args.give_up_after,
            shutdown_timeout_seconds=args.give_up_after,
        )


def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the examples to train with and those to test with, the same on every process."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    image, label = (digits.data / 16).astype(np.float32)[order], digits.target.astype(np.int32)[order]
    return {"image": image[360:], "label": label[360:]}, {"image": image[:360], "label": label[:360]}


def main() -> int:
    """Returns the exit code, the same on every process."""
    parser = argparse.ArgumentParser(description="Trains on digits with any number of processes.")
    parser.add_argument("--coordinator", help="host:port of process 0, where no launcher tells")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int, help="0 to num-processes - 1")
    parser.add_argument("--give-up-after", type=int, default=60, help="seconds to wait for a dead process")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--logdir", type=pathlib.Path, default="runs/multihost")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    args = parser.parse_args()
    join(args)

    train, test = load()
    trainer = DigitsTrainer(
        MLP(),
        optax.adam(1e-3),
        logdir=args.logdir,
        callbacks=[
            tk.callbacks.EMA(0.98),
            tk.callbacks.Progress(),
            # And when the fit ends, by a signal too, and when SIGUSR1 asks for it.
            tk.callbacks.Checkpoint(tk.Every(seconds=300)),
        ],
    )
    result = trainer.fit(
        tk.data.Arrays(train, args.batch_size, shuffle=True),
        epochs=args.epochs,
        eval_data=tk.data.Arrays(test, args.batch_size),
        resume=args.resume,
    )
    here = f"process {jax.process_index()} of {jax.process_count()}"
    if result.stopped_by in signal.Signals.__members__:
        print(f"{here}: {result.stopped_by} at step {result.step}, saved")
        return os.EX_TEMPFAIL
    scores = trainer.evaluate(tk.data.Arrays(test, args.batch_size))
    print(f"{here}: step {result.step}, test " + ", ".join(f"{name} {scores[name]:.4f}" for name in scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
