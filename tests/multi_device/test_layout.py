"""Sharded states: where leaves lie, what a device holds, the summary of it, and what is refused."""

import re

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import CLASSES, FEATURES, Net, NetTrainer, arrays, batches
from trainkit.parallel import Role

WIDTH = 64


class Wide(nn.Module):
    """Dimensions that 8 divides, except for the bias of the last layer."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(WIDTH)(x))
        x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(CLASSES)(x)


def wide(strategy, model=None):
    return NetTrainer(model or Wide(), optax.adam(1e-2), strategy=strategy, callbacks=[tk.callbacks.EMA(0.9)])


def held(state, device):
    """Bytes of `state` on one device, from its shards."""
    leaves = jax.tree.leaves((state.params, state.opt_state, state.hooks))
    return sum(
        shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device
    )


def whole(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state, state.hooks)))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_device_holds_its_part_of_parameters_optimizer_state_and_averages(parts, devices):
    made = wide(tk.parallel.Mesh(fsdp=parts))
    for state in (made.init(arrays(16)), made.fit(batches(2), epochs=1).state):
        bytes_held = {held(state, device) for device in devices(8)}
        assert len(bytes_held) == 1
        # Whole on each device are the bias of 4 (where 8 does not divide it) and two counters.
        spare = 4 * 4 * CLASSES + 8
        assert whole(state) / parts <= bytes_held.pop() <= whole(state) / parts + spare
        print(f"fsdp={parts}: {held(state, devices(8)[0]):,} of {whole(state):,} bytes")
    total = re.search(r"^total .* ([\d,]+) per device$", made.summary(), re.MULTILINE)
    assert int(total[1].replace(",", "")) == held(made.state, devices(8)[0])


@pytest.mark.parametrize("parts", [2, 8])
def test_no_device_ever_holds_the_whole(parts):
    made = wide(tk.parallel.Mesh(fsdp=parts))
    engine, batch = made._engine, arrays(16)
    init = engine.strategy.compile(engine.steps.init, inputs=(Role.WHOLE,) * 3, outputs=Role.STATE)
    compiled = init.lower(engine.given(), jax.random.key(0), engine.strategy.replicate(batch)).compile()
    kernels = {
        path: sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(compiled.output_shardings.params)
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert len(kernels) == 3
    assert not any(sharding.is_fully_replicated for sharding in kernels.values())
    # What the program makes on one device, its scratch included, is less than the whole parameters alone.
    memory = compiled.memory_analysis()
    state = made.init(batch)
    assert memory.output_size_in_bytes < 1.1 * whole(state) / parts + 200
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert memory.temp_size_in_bytes < 2.5 * largest / parts + 2000


def test_the_summary_shows_shardings_and_bytes_per_device():
    rules = [(r"Dense_0/kernel", (None, "tensor"))]
    made = wide(tk.parallel.Mesh(fsdp=4, tensor=2, rules=rules))
    made.init(arrays(16))
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in made.summary().splitlines()
        if "Dense_" in line
    }
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    size = FEATURES * WIDTH
    assert cells["Dense_0/kernel"] == [
        f"({FEATURES}, {WIDTH})",
        "float32",
        f"{size:,}",
        f"{4 * size:,}",
        "None, tensor",
        f"{2 * size:,}",
    ]
    assert cells["Dense_1/kernel"][-2:] == ["fsdp, None", f"{WIDTH * WIDTH:,}"]
    assert cells["Dense_2/bias"][-2:] == ["fsdp", "4"]
    assert "layout               data=1, fsdp=4, tensor=2 on cpu" in made.summary()
    one = wide(tk.parallel.Mesh(devices=jax.devices()[:1]))
    one.init(arrays(16))
    assert "per device" not in one.summary()
    assert "harding" not in one.summary()


# Flax's partitioning metadata --------------------------------------------------------------------------------


class Partitioned(nn.Module):
    """`Wide` whose first two layers say how they are divided."""

    names: tuple = ((None, "tensor"), ("tensor",))

    @nn.compact
    def __call__(self, x, train):
        split, back = (nn.with_partitioning(nn.initializers.lecun_normal(), names) for names in self.names)
        x = nn.relu(nn.Dense(WIDTH, kernel_init=split)(x))
        x = nn.relu(nn.Dense(WIDTH, kernel_init=back)(x))
        return nn.Dense(CLASSES)(x)


def test_partitioned_parameters_from_end_to_end(tmp_path):
    data = [*batches(2), arrays(5)]
    plain, made = (
        wide(tk.parallel.Mesh(devices=jax.devices()[:1])),
        wide(tk.parallel.Mesh(fsdp=2, tensor=2), Partitioned()),
    )
    result, expected = (each.fit(data, epochs=2, eval_data=data) for each in (made, plain))
    for get in (
        lambda state: state.params,
        lambda state: state.hooks["ema"].params,
        lambda state: state.opt_state,
    ):
        got, wanted = (jax.device_get(nn.meta.unbox(get(one.state))) for one in (result, expected))
        assert_same(got, wanted, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(
        result.history.last("eval/loss"), expected.history.last("eval/loss"), rtol=1e-5
    )
    np.testing.assert_allclose(
        made.predict(data)["logits"], plain.predict(data)["logits"], rtol=1e-3, atol=1e-5
    )
    # Still boxed after training, and divided as the boxes say: parameters, moments and averages.
    adam = result.state.opt_state[0]
    for params in (result.state.params, adam.mu, adam.nu, result.state.hooks["ema"].params):
        first, second = params["Dense_0"]["kernel"], params["Dense_1"]["kernel"]
        assert isinstance(first, nn.Partitioned)
        assert first.value.addressable_shards[0].data.shape == (FEATURES, WIDTH // 2)
        assert second.value.addressable_shards[0].data.shape == (WIDTH // 2, WIDTH)
    assert re.search(r"Dense_0/kernel .* None, tensor ", made.summary())
    restored = flax.serialization.from_bytes(result.state, flax.serialization.to_bytes(result.state))
    assert_same(jax.device_get(restored), jax.device_get(result.state))
    tk.save(tmp_path / "state.msgpack", result.state)
    assert_same(
        jax.device_get(tk.load(tmp_path / "state.msgpack", like=result.state)), jax.device_get(result.state)
    )
    # Goes on from what was read back, under the layout of the trainer.
    made.state = restored
    assert made.fit(data, steps=1).step == 7


class Logical(nn.Module):
    """`Wide` whose first two layers name their dimensions, of which no mesh has an axis."""

    rules: tuple | None = None

    @nn.compact
    def __call__(self, x, train):
        for names in (("features", "hidden"), ("hidden", "hidden_out")):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names, rules=self.rules)
            x = nn.relu(nn.Dense(WIDTH, kernel_init=init)(x))
        return nn.Dense(CLASSES)(x)


@pytest.mark.parametrize("strategy", ["jit", "fsdp", "pmap"])
def test_logical_names_that_nothing_maps_divide_nothing_and_that_is_said_once(strategy, caplog):
    data = batches(2)
    strategy = tk.parallel.Mesh(fsdp=2) if strategy == "fsdp" else strategy
    expected = wide(tk.parallel.Mesh(devices=jax.devices()[:1])).fit(data, epochs=1)
    made = wide(strategy, Logical())
    result = made.fit(data, epochs=1)
    got = nn.meta.unbox(result.state.params)
    assert_same(jax.device_get(got), jax.device_get(expected.state.params), rtol=1e-4, atol=2e-6)
    kernel = result.state.params["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.value.addressable_shards[0].data.shape == (FEATURES, WIDTH)
    said = [record.getMessage() for record in caplog.records if "are not divided" in record.getMessage()]
    assert len(said) == (0 if strategy == "pmap" else 1)
    assert strategy == "pmap" or "['features', 'hidden', 'hidden_out']" in said[0]


def test_logical_names_are_mapped_by_the_rules_of_flax_and_by_those_of_the_mesh():
    flax_rules = (("hidden", "tensor"), ("features", None), ("hidden_out", ("data", "fsdp")))
    state = wide(tk.parallel.Mesh(fsdp=2, tensor=2), Logical(flax_rules)).init(arrays(16))
    parts = [
        state.params[name]["kernel"].value.addressable_shards[0].data.shape for name in ("Dense_0", "Dense_1")
    ]
    assert parts == [(FEATURES, WIDTH // 2), (WIDTH // 2, WIDTH // 4)]
    own = tk.parallel.Mesh(tensor=4, rules=[(r"Dense_1/kernel", ("tensor", None))])
    state = wide(own, Logical()).init(arrays(16))
    assert state.params["Dense_1"]["kernel"].value.addressable_shards[0].data.shape == (WIDTH // 4, WIDTH)
    assert state.opt_state[0].mu["Dense_1"]["kernel"].value.addressable_shards[0].data.shape[0] == WIDTH // 4


def test_names_of_axes_that_the_mesh_has_not_do_no_harm_where_parameters_are_whole():
    state = wide("jit", Partitioned(names=((None, "model"), ("model",)))).init(arrays(16))
    assert state.params["Dense_0"]["kernel"].value.addressable_shards[0].data.shape == (FEATURES, WIDTH)


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 3}, r"Mesh\(data=3, fsdp=1, tensor=1\) takes 3 devices, and there are 8.*product is 8"),
        ({"fsdp": 3}, r"fsdp=3.* and there are 8"),
        ({"fsdp": 16}, r"takes 16 devices, and there are 8"),
        ({"data": 8, "tensor": 2}, r"takes 16 devices, and there are 8"),
    ],
)
def test_meshes_that_do_not_multiply(options, message):
    with pytest.raises(ValueError, match=message):
        wide(tk.parallel.Mesh(**options)).init(arrays(16))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [(r"Dense_9/kernel", (None, "tensor"))],
            r"Dense_9/kernel.*match no parameter.*Dense_0/kernel \[8, 64\]",
        ),
        ([(r"Dense_0/kernel", ("tensor",))], r"match no parameter.*one entry per dimension"),
        ([(r"Dense_0/bias", ("tensor",)), (r"kernell", (None, "tensor"))], r"rules \('kernell'"),
    ],
)
def test_rules_that_match_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        wide(tk.parallel.Mesh(tensor=2, rules=rules)).init(arrays(16))


def test_rules_of_unknown_axes_are_refused_at_once():
    with pytest.raises(
        ValueError, match=r"'kernel' names the axes \['model'\]; the mesh has \('data', 'fsdp', 'tensor'\)"
    ):
        tk.parallel.Mesh(rules=[("kernel", (None, "model"))])


def test_dimensions_that_do_not_divide():
    rules = [(r"Dense_2/kernel", (None, "tensor"))]
    odd = Partitioned(names=(("tensor", None), (None, None)))
    with pytest.raises(
        ValueError, match=r"Dense_2/kernel has shape \[64, 4\], and 4 is not divisible by tensor=8"
    ):
        wide(tk.parallel.Mesh(tensor=8, rules=rules)).init(arrays(16))
    with pytest.raises(
        ValueError, match=r"Dense_0/kernel has shape \[8, 64\], and 8 is not divisible by tensor=3"
    ):
        wide(tk.parallel.Mesh(tensor=3, devices=jax.devices()[:3]), odd).init(arrays(18))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((None, "model"), r"Dense_0/kernel is partitioned over the axes \['model'\]; the mesh has"),
        (
            (None, "tensor", None),
            r"Dense_0/kernel has shape \[8, 64\] and is partitioned by \(None, 'tensor', None\)",
        ),
    ],
)
def test_partitioning_that_fits_no_mesh(names, message):
    made = wide(tk.parallel.Mesh(tensor=2), Partitioned(names=(names, ("tensor",))))
    with pytest.raises(ValueError, match=message):
        made.init(arrays(16))


def test_optimizer_state_of_another_shape_is_laid_out_all_the_same():
    # Factored second moments keep a row and a column per parameter, and [1] where they keep none.
    rules = [(r"Dense_\d/kernel", (None, "tensor")), (r"Dense_0/bias", ("tensor",))]
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    losses = []
    for strategy in (
        tk.parallel.Mesh(fsdp=4, tensor=2, rules=rules),
        tk.parallel.Mesh(devices=jax.devices()[:1]),
    ):
        result = NetTrainer(Wide(), tx, strategy=strategy).fit(batches(3), epochs=2)
        losses.append(result.history.last("train/loss"))
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_replicas_refuse_a_batch_that_does_not_divide():
    made = NetTrainer(Net(axis_name="batch"), optax.sgd(0.1), strategy="pmap")
    with pytest.raises(
        ValueError, match=r"batch of 12 cannot be divided over 8 replicas.*divisible by 8, drop_last"
    ):
        made.fit(batches(1, rows=12), epochs=1)


class OneExample(tk.Trainer):
    """A loss that takes one example: it indexes by a label and flattens."""

    def loss(self, model, batch, ctx):
        return -nn.log_softmax(model(batch["x"], train=ctx.train))[batch["y"]], {}


class Batched(tk.Trainer):
    def loss(self, model, batch, ctx):
        images = batch["x"].reshape(batch["x"].shape[0], -1)
        return ((model(images, train=ctx.train) - 1) ** 2).mean(-1), {}


class Ranked(Batched):
    def loss(self, model, batch, ctx):
        x, y = jnp.split(batch["x"], 2, axis=1)
        return (x - y).mean(-1), {}


def test_a_loss_for_one_example_is_recognised_under_jit():
    with pytest.raises(
        ValueError, match=r"shape \[16, 4\] for a batch of 16.*written for ONE example.*strategy='vmap'"
    ):
        OneExample(Wide(), optax.sgd(0.1)).fit(batches(1), epochs=1)
    assert OneExample(Wide(), optax.sgd(0.1), strategy="vmap").fit(batches(1), epochs=1).step == 1


def test_a_loss_for_a_batch_is_recognised_under_vmap():
    with pytest.raises(ValueError, match=r"shape \[8\] for one example.*ONE example.*strategy='jit'"):
        Batched(Wide(), optax.sgd(0.1), strategy="vmap").fit(batches(1), epochs=1)
    assert Batched(Wide(), optax.sgd(0.1)).fit(batches(1), epochs=1).step == 1
    # One that fails by itself is told what it was called with.
    with pytest.raises(IndexError, match="tuple index") as caught:
        Ranked(Wide(), optax.sgd(0.1), strategy="vmap").fit(batches(1), epochs=1)
    assert "ONE example, as strategy='vmap' does: x float32[8], y int32[]" in caught.value.__notes__[0]
