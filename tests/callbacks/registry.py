"""Every callback that trainkit ships, made as a user would make it: what the conformance suite goes through.

A new callback is one line here.
"""

import trainkit as tk

REGISTRY = {
    "ActivationStats": lambda: tk.callbacks.ActivationStats(tk.Every(steps=2)),
    "EMA": lambda: tk.callbacks.EMA(0.9),
    "EarlyStopping": lambda: tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=50),
    "GradientNoiseScale": lambda: tk.callbacks.GradientNoiseScale(tk.Every(steps=2)),
    "EvalView": lambda: tk.callbacks.EvalView(lambda state: state),
    "Lambda": lambda: tk.callbacks.Lambda(on_step=lambda info: None),
    "LearningRate": lambda: tk.callbacks.LearningRate(schedule=lambda count: 0.1 / (1 + count)),
    "LogMetrics": lambda: tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
    "NanGuard": lambda: tk.callbacks.NanGuard("skip"),
    "Probe": lambda: tk.callbacks.Probe(
        lambda values: values.loss, every=tk.Every(steps=2), name="probed_loss"
    ),
    "Progress": lambda: tk.callbacks.Progress(),
    "ReduceOnPlateau": lambda: tk.callbacks.ReduceOnPlateau("eval/loss", mode="min", patience=50),
    "SpikeGuard": lambda: tk.callbacks.SpikeGuard(factor=3.0, window=2, every=tk.Every(steps=2)),
    "Watch": lambda: tk.callbacks.Watch(tk.Every(steps=2), histograms=True),
    "SWA": lambda: tk.callbacks.SWA(2, 2),
}
"""Functions that make one, by name of the class."""
