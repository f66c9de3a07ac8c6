"""Every callback that trainkit ships, made as a user would make it: what the conformance suite goes through.

A new callback is one line here.
"""

import matplotlib.figure
import numpy as np

import trainkit as tk
from trainkit.testing._classifier import examples


class _Trial:
    """What of Optuna's trials is asked for."""

    def report(self, value, step):
        pass

    def should_prune(self):
        return False


REGISTRY = {
    "ActivationStats": lambda: tk.callbacks.ActivationStats(tk.Every(steps=2)),
    "ConfusionMatrix": lambda: tk.callbacks.ConfusionMatrix([examples(4, seed=9)]),
    "EMA": lambda: tk.callbacks.EMA(0.9),
    "EarlyStopping": lambda: tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=50),
    "Embedding": lambda: tk.callbacks.Embedding(lambda info: (np.eye(4), [*"abcd"], np.zeros((4, 2, 2, 1)))),
    "EvalView": lambda: tk.callbacks.EvalView(lambda state: state),
    "Figure": lambda: tk.callbacks.Figure(lambda info: matplotlib.figure.Figure(figsize=(1, 1))),
    "Finetune": lambda: tk.callbacks.Finetune({"Dense_0/kernel": tk.At(steps=(4,))}),
    "GradientNoiseScale": lambda: tk.callbacks.GradientNoiseScale(tk.Every(steps=2)),
    "HParams": lambda: tk.callbacks.HParams({"model": {"width": 8}}),
    "Images": lambda: tk.callbacks.Images(lambda info: np.zeros((2, 4, 4, 1)), every=tk.Every(steps=2)),
    "Lambda": lambda: tk.callbacks.Lambda(on_step=lambda info: None),
    "LearningRate": lambda: tk.callbacks.LearningRate(schedule=lambda count: 0.1 / (1 + count)),
    "LogMetrics": lambda: tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
    "Memory": lambda: tk.callbacks.Memory(tk.Every(steps=2)),
    "ModelSummary": lambda: tk.callbacks.ModelSummary(),
    "NanGuard": lambda: tk.callbacks.NanGuard("skip"),
    "OptunaPrune": lambda: tk.callbacks.OptunaPrune(_Trial(), "eval/loss"),
    "Probe": lambda: tk.callbacks.Probe(
        lambda values: values.loss, every=tk.Every(steps=2), name="probed_loss"
    ),
    "Profile": lambda: tk.callbacks.Profile(at=2, steps=2),
    "Progress": lambda: tk.callbacks.Progress(),
    "ReduceOnPlateau": lambda: tk.callbacks.ReduceOnPlateau("eval/loss", mode="min", patience=50),
    "SWA": lambda: tk.callbacks.SWA(2, 2),
    "SetHyperparam": lambda: tk.callbacks.SetHyperparam("learning_rate", lambda info: 0.1 / (1 + info.step)),
    "SpikeGuard": lambda: tk.callbacks.SpikeGuard(factor=3.0, window=2, every=tk.Every(steps=2)),
    "StopAfter": lambda: tk.callbacks.StopAfter(steps=1000),
    "StopWhen": lambda: tk.callbacks.StopWhen("eval/loss", below=-1.0),
    "Text": lambda: tk.callbacks.Text(lambda info: f"step {info.step}", every=tk.Every(steps=2)),
    "Throughput": lambda: tk.callbacks.Throughput(tk.Every(steps=2), items={"rows": lambda batch: 1}),
    "Watch": lambda: tk.callbacks.Watch(tk.Every(steps=2), histograms=True),
}
"""Functions that make one, by name of the class."""
