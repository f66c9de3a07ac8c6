"""Every callback that trainkit ships, made as a user would make it: what the conformance suite goes through.

A new callback is one line here.
"""

import trainkit as tk

REGISTRY = {
    "EMA": lambda: tk.callbacks.EMA(0.9),
    "EarlyStopping": lambda: tk.callbacks.EarlyStopping("eval/loss", mode="min", patience=50),
    "Finetune": lambda: tk.callbacks.Finetune({"Dense_0/kernel": tk.At(steps=(4,))}),
    "Lambda": lambda: tk.callbacks.Lambda(on_step=lambda info: None),
    "LearningRate": lambda: tk.callbacks.LearningRate(schedule=lambda count: 0.1 / (1 + count)),
    "LogMetrics": lambda: tk.callbacks.LogMetrics(every=tk.Every(steps=3)),
    "NanGuard": lambda: tk.callbacks.NanGuard("skip"),
    "Progress": lambda: tk.callbacks.Progress(),
    "ReduceOnPlateau": lambda: tk.callbacks.ReduceOnPlateau("eval/loss", mode="min", patience=50),
    "SetHyperparam": lambda: tk.callbacks.SetHyperparam("learning_rate", lambda info: 0.1 / (1 + info.step)),
}
"""Functions that make one, by name of the class."""
