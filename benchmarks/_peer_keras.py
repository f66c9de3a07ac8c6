"""The same models in Keras 3 on JAX, trained by `Model.fit`. Imports no Flax and no trainkit."""

import functools
import os
from typing import Any

# Read when keras is imported.
os.environ["KERAS_BACKEND"] = "jax"

import keras
from _task import Make, Running, Task
from keras import layers


class Positions(layers.Layer):
    """Adds learned positions."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=tuple(input_shape[1:]), initializer="random_normal")

    def call(self, x):
        return x + self.table


def model_of(task: Task) -> tuple[keras.Model, Any]:
    """Returns the model and the optimizer of a workload."""
    options = task.options
    match task.name:
        case "W1":
            sizes = [layers.Dense(128, activation="relu"), layers.Dense(10)]
            return keras.Sequential([layers.Input((64,)), *sizes]), keras.optimizers.Adam(1e-3)
        case "W2":
            return _cnn(), keras.optimizers.SGD(0.1, 0.9)
        case "W3":
            return _resnet(options), keras.optimizers.SGD(0.05, 0.9)
        case "W4":
            return _transformer(options), keras.optimizers.AdamW(1e-3, weight_decay=1e-4)
    raise ValueError(f"no workload {task.name!r} in Keras")


def _cnn() -> keras.Model:
    stack: list[Any] = [layers.Input((28, 28, 1))]
    for features in (32, 64):
        stack += [layers.Conv2D(features, 3, padding="same", activation="relu"), layers.AveragePooling2D(2)]
    return keras.Sequential(
        [*stack, layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(10)]
    )


def _resnet(options: dict[str, Any]) -> keras.Model:
    def norm(x: Any) -> Any:
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def conv(x: Any, features: int, strides: int = 1, size: int = 3) -> Any:
        return layers.Conv2D(features, size, strides=strides, padding="same", use_bias=False)(x)

    inputs = layers.Input((options["image"], options["image"], 3))
    x = layers.ReLU()(norm(conv(inputs, options["width"])))
    for stage in range(3):
        for block in range(options["blocks"]):
            features, strides = options["width"] * 2**stage, 2 if stage and not block else 1
            y = layers.ReLU()(norm(conv(x, features, strides)))
            y = norm(conv(y, features))
            if x.shape != y.shape:
                x = norm(conv(x, features, strides, size=1))
            x = layers.ReLU()(layers.add([x, y]))
    return keras.Model(inputs, layers.Dense(options["classes"])(layers.GlobalAveragePooling2D()(x)))


def _transformer(options: dict[str, Any]) -> keras.Model:
    width, heads = options["width"], options["heads"]
    inputs = layers.Input((options["context"],), dtype="int32")
    h = Positions()(layers.Embedding(options["vocabulary"], width)(inputs))
    for _ in range(options["layers"]):
        y = layers.LayerNormalization(epsilon=1e-6)(h)
        h = h + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-6)(h)
        h = h + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
    return keras.Model(
        inputs, layers.Dense(options["vocabulary"])(layers.LayerNormalization(epsilon=1e-6)(h))
    )


def fit(task: Task, tmp: str, *, steps_per_execution: int = 1) -> Running:
    """`Model.fit` on the arrays, as users call it, without its progress bar."""
    model, optimizer = model_of(task)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=steps_per_execution)
    batch_size = task.options["batch_size"]
    if "tokens" in task.arrays:
        x, y = task.arrays["tokens"][:, :-1], task.arrays["tokens"][:, 1:]
    else:
        x, y = task.arrays["image"], task.arrays["label"]
    # Whole batches only: a smaller last one would be compiled and run as well.
    per_epoch = len(x) // batch_size
    x, y = x[: per_epoch * batch_size], y[: per_epoch * batch_size]

    def run(steps: int) -> int:
        # Short runs end inside an epoch; long ones are the nearest number of whole ones.
        epochs, length = (1, steps) if steps < per_epoch else (round(steps / per_epoch), per_epoch)
        model.fit(x, y, batch_size, epochs, verbose=0, steps_per_epoch=length)
        return epochs * length

    return Running(run)


CONTESTANTS: dict[str, Make] = {
    "Keras": fit,
    "Keras, 10 steps per execution": functools.partial(fit, steps_per_execution=10),
}
