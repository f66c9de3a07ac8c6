"""Searches for good hyperparameters on scikit-learn's digits with Optuna, which prunes what goes badly.

pip install 'trainkit[examples,search,tensorboard]'
python examples/search.py
python examples/search.py --trials 40 --epochs 20

Each trial is a run of its own in the folder of the search: TensorBoard lays them over each other, and its page HPARAMS
has a row for each.
"""

import argparse
import pathlib
import time

import flax
import jax
import numpy as np
import optax
import optuna
from clu import metrics
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import trainkit as tk


class Net(nn.Module):
    """Two dense layers with dropout between them."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(nn.Dropout(self.dropout, deterministic=not train)(x))


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class DigitsTrainer(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"], train=ctx.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns images, float32 [examples, 64], and labels, int32 [examples]: to train with and to choose by."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    return {"image": parts[0], "label": parts[2]}, {"image": parts[1], "label": parts[3]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches for good hyperparameters on digits.")
    parser.add_argument("--logdir", type=pathlib.Path, default="runs/search", help="folder of all searches")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=15, help="of a trial that is not pruned")
    args = parser.parse_args()

    train, valid = load()
    train_data = tk.data.Arrays(train, batch_size=64, shuffle=True)
    valid_data = tk.data.Arrays(valid, batch_size=256)
    folder = args.logdir / time.strftime("%m%d-%H%M%S")

    def objective(trial: optuna.Trial) -> float:
        hparams = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1.0, log=True),
            "width": trial.suggest_categorical("width", [16, 64, 256]),
            "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        }
        pruning = tk.callbacks.OptunaPrune(trial, "eval/loss")
        trainer = DigitsTrainer(
            Net(hparams["width"], hparams["dropout"]),
            optax.adam(hparams["learning_rate"]),
            logdir=folder / f"trial-{trial.number:03}",
            callbacks=[
                tk.callbacks.LogMetrics(tk.Every(epochs=1)),
                tk.callbacks.Lambda(on_fit_start=lambda info: info.writer.write_hparams(hparams)),
                pruning,
            ],
        )
        result = trainer.fit(train_data, epochs=args.epochs, eval_data=valid_data)
        accuracy = result.metrics["eval/accuracy"]
        print(f"trial {trial.number:>3}: {accuracy.last:.3f}  {result.stopped_by or 'all epochs'}  {hparams}")
        pruning.raise_if_pruned()
        return result.metrics["eval/loss"].last

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2 * len(train_data))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=args.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"best is trial {study.best_trial.number} with loss {study.best_value:.4f}: {study.best_params}")
    print(f"{pruned} of {len(study.trials)} trials were pruned")
    print(f"tensorboard --logdir {folder}")


if __name__ == "__main__":
    main()
