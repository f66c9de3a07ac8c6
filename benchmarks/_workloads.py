"""The workloads in Flax: model, optimizer, loss and metrics, and the step one would write for them by hand.

Imports no trainkit unless a trainer is asked for: the loops by hand are to be started without it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import _data
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _task import Task
from clu import metrics
from flax import linen as nn
from flax.training import train_state


class MLP(nn.Module):
    """64-128-10: a step of little more than its dispatch."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


class CNN(nn.Module):
    """The model of Flax's MNIST example."""

    @nn.compact
    def __call__(self, x, *, train):
        for features in (32, 64):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """Three stages of basic blocks with BatchNorm, as He et al. (2016) have them for CIFAR-10."""

    width: int
    blocks: int
    classes: int

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(norm()(conv(self.width)(x)))
        for stage in range(3):
            for block in range(self.blocks):
                features, strides = self.width * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(conv(features, strides=strides)(x)))
                y = norm()(conv(features)(y))
                if x.shape != y.shape:
                    x = norm()(conv(features, kernel_size=(1, 1), strides=strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """A decoder over characters, pre-norm, with learned positions."""

    vocabulary: int
    width: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, x, *, train):
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        mask = nn.make_causal_mask(x)
        h = nn.Embed(self.vocabulary, self.width)(x) + positions
        for _ in range(self.layers):
            h = h + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(h), mask=mask)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)))
            h = h + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(h))


class ResNet50(nn.Module):
    """Bottleneck blocks in bfloat16, parameters and statistics in float32, as Flax's ImageNet example has them."""

    width: int
    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train):
        dtype = jnp.bfloat16
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=dtype)
        # The images come as bytes, a quarter of the traffic.
        x = (x.astype(dtype) - 127) / 64
        x = nn.relu(norm()(conv(self.width, (7, 7), (2, 2), padding=3)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                features, strides = self.width * 2**stage, (2, 2) if stage and not block else (1, 1)
                y = nn.relu(norm()(conv(features, (1, 1))(x)))
                y = nn.relu(norm()(conv(features, (3, 3), strides)(y)))
                y = norm(scale_init=nn.initializers.zeros)(conv(4 * features, (1, 1))(y))
                if x.shape != y.shape:
                    x = norm()(conv(4 * features, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000, dtype=dtype)(x.mean(axis=(1, 2))).astype(jnp.float32)


@flax.struct.dataclass
class Metrics(metrics.Collection):
    """What every loop computes at every step."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Average.from_output("correct")


class State(train_state.TrainState):
    """The state of the loops by hand."""

    batch_stats: Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model with its data.

    Attributes:
        model: a `flax.linen.Module`, called as `model(inputs, train=)`.
        tx: an optax transformation.
        arrays: the data, `[examples, ...]`.
        batch_size: rows in a batch.
        inputs: `inputs(batch)`, what the model takes.
        losses: `losses(logits, batch)`, one per example and the outputs for the metrics.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    arrays: dict[str, np.ndarray]
    batch_size: int
    inputs: Callable[[Any], jax.Array]
    losses: Callable[[jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]

    def batches(self) -> Iterator[Any]:
        """Yields shuffled host batches for ever."""
        return _data.batches(self.arrays, self.batch_size)

    def first(self) -> Any:
        """Returns one batch, for its shapes."""
        return {name: leaf[: self.batch_size] for name, leaf in self.arrays.items()}

    def variables(self) -> dict[str, Any]:
        """Returns what all loops start from."""
        init = jax.jit(functools.partial(self.model.init, train=True))
        return init(jax.random.key(0), self.inputs(self.first()))

    def state(self) -> State:
        """Returns the state that the loops by hand start from."""
        variables = self.variables()
        state = State.create(
            apply_fn=self.model.apply,
            params=variables["params"],
            tx=self.tx,
            batch_stats=variables.get("batch_stats", {}),
        )
        # A Python int would be weakly typed, and the second step compiled anew.
        return state.replace(step=jnp.zeros((), jnp.int32))


def load(task: Task) -> Workload:
    """Returns the workload of a task."""
    options = task.options
    match task.name:
        case "W1":
            model, tx = MLP(), optax.adam(1e-3)
        case "W2":
            model, tx = CNN(), optax.sgd(0.1, 0.9)
        case "W3":
            model, tx = ResNet(options["width"], options["blocks"], options["classes"]), optax.sgd(0.05, 0.9)
        case "W4":
            sizes = [options[name] for name in ("vocabulary", "width", "heads", "layers")]
            model, tx = Transformer(*sizes), optax.adamw(1e-3)
        case "R50":
            model = ResNet50(options["width"], tuple(options["stages"]))
            tx = optax.sgd(0.1, 0.9, nesterov=True)
        case name:
            raise ValueError(f"no workload {name!r}")
    on_text = "tokens" in task.arrays
    inputs, losses = (_all_but_last, token_losses) if on_text else (_image, image_losses)
    return Workload(model, tx, task.arrays, options["batch_size"], inputs, losses)


def image_losses(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses, {"correct": (logits.argmax(-1) == batch["label"]).astype(jnp.float32)}


def token_losses(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the next characters, one mean per window."""
    labels = batch["tokens"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(axis=-1)
    return losses, {"correct": (logits.argmax(-1) == labels).mean(axis=-1)}


def _image(batch: Any) -> jax.Array:
    return batch["image"]


def _all_but_last(batch: Any) -> jax.Array:
    return batch["tokens"][:, :-1]


def hand_step(
    workload: Workload, state: State, totals: Metrics, batch: Any
) -> tuple[State, Metrics, jax.Array]:
    """One update with its metrics merged into `totals`, and its mean loss. To be jitted, the first two donated."""

    def objective(params):
        variables = {"params": params}
        if state.batch_stats:
            variables["batch_stats"] = state.batch_stats
        logits, updated = state.apply_fn(
            variables, workload.inputs(batch), train=True, mutable=["batch_stats"]
        )
        losses, outputs = workload.losses(logits, batch)
        return losses.mean(), (losses, outputs, updated.get("batch_stats", {}))

    grads, (losses, outputs, stats) = jax.grad(objective, has_aux=True)(state.params)
    totals = totals.merge(Metrics.single_from_model_output(loss=losses, **outputs))
    return state.apply_gradients(grads=grads, batch_stats=stats), totals, losses.mean()


def hand_eval(workload: Workload, variables: Any, totals: Metrics, batch: Any) -> Metrics:
    """One batch's metrics merged into `totals`. To be jitted, `totals` donated."""
    logits = workload.model.apply(variables, workload.inputs(batch), train=False)
    losses, outputs = workload.losses(logits, batch)
    return totals.merge(Metrics.single_from_model_output(loss=losses, **outputs))


def trainer(workload: Workload, *, start: bool = True, **arguments: Any) -> Any:
    """Returns a `tk.Trainer`; with `start` it starts where the loops by hand do, else it initialises itself."""
    import trainkit as tk

    class Trainer(tk.Trainer):
        metrics = Metrics

        def loss(self, model, batch, ctx):
            return workload.losses(model(workload.inputs(batch), train=ctx.train), batch)

    made = Trainer(workload.model, workload.tx, **arguments)
    if start:
        made.init(workload.first())  # before all else, as in a run of its own: it sets up the process
        made.state = tk.TrainState.from_variables(
            apply_fn=workload.model.apply,
            variables=workload.variables(),
            tx=workload.tx,
            rng=jax.random.key(1),
        )
    return made
