"""`ModelSummary`: shapes, parameters and operations by hand, and XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.runs import dies_at
from tests.helpers.writer_calls import texts
from trainkit._core.flops import count
from trainkit.callbacks import Checkpoint, Lambda, ModelSummary

X = np.zeros((4, 6, 6, 1), np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), padding="VALID", use_bias=False)(x)
        return nn.Dense(5)(x.reshape(*x.shape[:-3], -1))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (2,))
        shared = nn.Dense(5, use_bias=False)
        return shared(shared(Block()(x))) * scale.sum()


class Trainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch) ** 2).sum(-1), {}


def layers_of(model, *, x=X, kind=Trainer, **options):
    """What a hook is told at the start of a fit."""
    found = []
    look = Lambda(on_fit_start=lambda info: found.extend(info.layers()))
    kind(model, optax.sgd(0.1), callbacks=[look], **options).fit([x], steps=1)
    return {layer.path: layer for layer in found}


def rows_of(text):
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_shapes_parameters_and_operations_are_those_by_hand():
    found = layers_of(Net())
    assert list(found) == ["", "Block_0", "Block_0/Conv_0", "Block_0/Dense_0", "Dense_0", "(outside)"]
    conv, dense, shared = found["Block_0/Conv_0"], found["Block_0/Dense_0"], found["Dense_0"]
    assert (conv.kind, conv.inputs, conv.outputs) == (
        "Conv",
        ("float32[4, 6, 6, 1]",),
        ("float32[4, 4, 4, 3]",),
    )
    assert (conv.parameters, conv.bytes, conv.flops) == (27, 108, 2 * (4 * 4 * 4 * 3) * 9)
    assert (dense.parameters, dense.flops) == (48 * 5 + 5, 2 * 4 * 48 * 5 + 4 * 5)
    assert (shared.calls, shared.parameters, shared.flops) == (2, 25, 2 * (2 * 4 * 5 * 5))
    assert (found[""].kind, found[""].parameters, found[""].flops) == ("Net", 2, 2 + 4 * 5)
    assert (found["Block_0"].parameters, found["Block_0"].flops) == (0, 0)
    assert found["(outside)"].flops >= 2 * 4 * 5  # squares, and their sums


def test_the_count_is_that_of_xla():
    def f(x, w, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y, _ = jax.lax.scan(lambda carry, _: (carry @ w, None), y.reshape(len(y), -1), None, length=3)
        return jax.nn.relu(y + 1).sum(0)

    args = jnp.ones((8, 9, 9, 2)), jnp.ones((64, 64)), jnp.ones((3, 3, 2, 4))
    by_hand = 2 * (8 * 4 * 4 * 4) * 18 + 3 * 2 * 8 * 64 * 64 + 3 * 8 * 64
    assert count(jax.make_jaxpr(f)(*args)).total() == pytest.approx(by_hand, rel=0.01)
    unrolled = jax.jit(lambda x, w, k: f(x, w, k)).lower(*args).cost_analysis()["flops"]
    # XLA counts the body of a loop once.
    assert unrolled == pytest.approx(by_hand - 2 * 2 * 8 * 64 * 64, rel=0.01)


@pytest.mark.parametrize(
    ("strategy", "shape"), [("vmap", "6, 6, 1"), ("pmap", "4, 6, 6, 1"), ("jit", "4, 6, 6, 1")]
)
def test_under_every_strategy_the_same_operations(strategy, shape):
    found = layers_of(Net(), strategy=strategy)
    assert found["Block_0/Conv_0"].inputs == (f"float32[{shape}]",)
    assert found["Block_0/Conv_0"].flops == 2 * (4 * 4 * 4 * 3) * 9
    assert found["Dense_0"].flops == 2 * (2 * 4 * 5 * 5)


def test_lifted_modules_methods_and_setup_are_found():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return nn.Dense(3, use_bias=False, name="inner")(carry), None

    class Lifted(nn.Module):
        def setup(self):
            self.first = nn.Dense(3, use_bias=False)
            self.loop = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
            self.again = nn.remat(nn.Dense)(3, use_bias=False)

        def encode(self, x):
            return self.again(self.loop(self.first(x), None)[0])

        def __call__(self, x):
            return self.encode(x)

    found = layers_of(Lifted(), x=np.zeros((2, 3), np.float32))
    assert {path: layer.parameters for path, layer in found.items() if layer.parameters} == {
        "first": 9,
        "loop/inner": 36,
        "again": 9,
    }
    each = 2 * 2 * 3 * 3
    assert (found["first"].flops, found["loop/inner"].flops, found["again"].flops) == (each, 4 * each, each)
    assert found[""].calls == 1


def test_a_trainer_that_cannot_evaluate_has_its_parameters():
    class Own(tk.Trainer):
        def train_step(self, state, batch):
            return state.apply_gradients(grads=state.params), {"loss": jnp.zeros(())}

        def init_variables(self, rng, batch):
            return Block().init(rng, batch)

    found = layers_of(Block(), kind=Own)
    assert {path: layer.parameters for path, layer in found.items()} == {"Conv_0": 27, "Dense_0": 245}
    assert {layer.flops for layer in found.values()} == {None}


def test_the_table_is_in_the_log_and_adds_up(tmp_path):
    callbacks = [ModelSummary(), ModelSummary(name="short", depth=1)]
    made = Trainer(Net(), optax.sgd(0.1), callbacks=callbacks, logdir=tmp_path)
    made.fit([X], steps=1)
    made.fit([X], steps=1)
    said = texts(tmp_path)
    assert {name: list(steps) for name, steps in said.items()} == {"model_summary": [0], "short": [0]}
    whole, short = rows_of(said["model_summary"][0]), rows_of(said["short"][0])
    assert whole["Block_0/Conv_0"] == {
        "class": "Conv",
        "input": "float32[4, 6, 6, 1]",
        "output": "float32[4, 4, 4, 3]",
        "parameters": "27",
        "bytes": "108",
        "FLOPs": "3,456",
    }
    assert whole["Dense_0"]["class"] == "Dense × 2"
    assert list(short) == ["(model)", "Block_0", "Dense_0", "(outside)", "**total**"]
    assert short["Block_0"]["parameters"] == str(27 + 245)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.state.params))
    for rows in (whole, short):
        assert rows["**total**"]["parameters"] == str(parameters)
        own = [int(row["FLOPs"].replace(",", "")) for row in rows.values() if row["FLOPs"]]
        assert own[-1] == sum(own[:-1])
    assert made._engine.steps.traces.count("training") == 1


def test_a_resumed_run_has_it_once(tmp_path):
    def fit(*callbacks):
        saves = Checkpoint(every=tk.Every(steps=1))
        made = Trainer(
            Block(), optax.sgd(0.1), callbacks=[ModelSummary(), saves, *callbacks], logdir=tmp_path
        )
        made.fit([X], steps=3, resume=True)

    with pytest.raises(ConnectionError):
        fit(dies_at(2))
    fit()
    assert list(texts(tmp_path)["model_summary"]) == [0]


def test_arguments_are_checked():
    for depth in (0, True, "all"):
        with pytest.raises(ValueError, match=r"ModelSummary\(depth=.*must be an int of at least 1"):
            ModelSummary(depth=depth)
    with pytest.raises(TypeError, match="expected a non-empty string"):
        ModelSummary(name="")
