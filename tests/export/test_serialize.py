"""`tk.save` and `tk.load`: what was saved comes back bit for bit, or an error says what is wrong."""

import dataclasses
import os
import subprocess
import sys
from typing import NamedTuple

import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import trainkit._core.atomic
from trainkit._core.state import TrainState
from trainkit.export._serialize import load, restore, save
from trainkit.hooks._ema import ema_hook
from trainkit.hooks._hook import StepValues, init_hooks, update_hooks

SUFFIXES = ["safetensors", "msgpack"]
DTYPES = [
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "int64",
    "bool",
]


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"tree.{request.param}"


def assert_same(actual, expected):
    """Structure, kind of leaf, dtype, shape and every bit agree."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(got, jax.Array) == isinstance(want, jax.Array)
        if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            assert got.dtype == want.dtype
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        got, want = np.asarray(got), np.asarray(want)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes()


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(2)(x)


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.identity(), optax.adamw(1e-2))


def make_state(seed, *, freeze=False, steps=0):
    """A state with batch statistics, a chain with empty states, a key and an average, after some updates."""
    variables = Model().init(jax.random.key(seed), jnp.ones((3, 5)))
    if freeze:
        variables = flax.core.freeze(variables)
    state = TrainState.from_variables(
        apply_fn=Model().apply, variables=variables, tx=TX, rng=jax.random.key(seed + 1, impl="rbg")
    )
    hooks = (ema_hook("ema", 0.9, debias=True, batch_stats=True),)
    state = init_hooks(hooks, state)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, scale=step + 1: scale * jnp.ones_like(leaf), state.params)
        state = state.apply_gradients(grads=grads)
        state = update_hooks(hooks, StepValues(state, jnp.zeros(()), grads))
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(path, dtype, shape):
    bits = np.random.default_rng(0).integers(0, 256, size=(*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
    array = bits.view(jnp.dtype(dtype)).reshape(shape) if dtype != "bool" else (bits > 127).reshape(shape)
    save(path, {"x": array})
    assert_same(load(path), {"x": array})
    assert_same(load(path, like={"x": np.zeros(shape, array.dtype)}), {"x": array})


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_further_dtypes_of_both_formats(path, dtype):
    array = np.arange(5).astype(jnp.dtype(dtype))
    save(path, {"x": array})
    assert_same(load(path), {"x": array})


def test_a_dtype_safetensors_lacks_is_refused_and_msgpack_holds_it(tmp_path):
    tree = {"weights": {"x": np.arange(3).astype(jnp.int4)}}
    with pytest.raises(ValueError, match=r"weights/x has dtype int4.*save as \.msgpack"):
        save(tmp_path / "x.safetensors", tree)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "x.msgpack", tree)
    assert_same(load(tmp_path / "x.msgpack"), tree)


def test_arrays_in_any_memory_order(path):
    base = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    tree = {"transposed": base.T, "strided": base[::2, ::-1], "fortran": np.asfortranarray(base)}
    save(path, {**tree, "big_endian": base.astype(">f4")})
    loaded = load(path)
    np.testing.assert_array_equal(loaded.pop("big_endian"), base)
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, tree[name])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_come_back_typed(path, impl):
    tree = {
        "one": jax.random.key(3, impl=impl),
        "many": [jax.random.split(jax.random.key(4, impl=impl), (2, 3))],
    }
    save(path, tree)
    assert_same(load(path, like=tree), tree)
    bare = load(path)
    assert_same(bare["many"]["0"], tree["many"][0])
    assert_same(jax.random.bits(bare["one"], (4,)), jax.random.bits(tree["one"], (4,)))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_train_state_comes_back_whole(path, freeze):
    state = make_state(0, freeze=freeze, steps=3)
    save(path, state)
    template = make_state(7, freeze=freeze)
    loaded = load(path, like=template)
    assert_same(loaded, state.replace(apply_fn=template.apply_fn))
    assert loaded.apply_fn is template.apply_fn
    abstract = jax.eval_shape(lambda: make_state(7, freeze=freeze))
    assert_same(jax.tree.leaves(load(path, like=abstract)), jax.tree.leaves(state))


def test_a_state_whose_buffers_were_donated_serves_as_template(path):
    state = make_state(0, steps=1)
    save(path, state)
    expected = jax.tree.map(jnp.copy, state)
    jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(state)
    assert state.params["Dense_0"]["kernel"].is_deleted()
    assert_same(load(path, like=state), expected)


def test_any_pytree_serves_as_template(path):
    tree = {
        "pair": Pair(np.ones(2, np.float32), [jnp.zeros(3), (np.int8(4),)]),
        "layer": Layer(jnp.ones((2, 2)), None),
        "optax": optax.adam(1e-3).init({"w": jnp.ones(3)}),
        "numbers": [True, 5, 0.1],
        "by_number": {7: np.arange(3)},
        "empty": {},
    }
    save(path, tree)
    loaded = load(path, like=tree)
    assert_same(loaded, tree)
    assert [type(number) for number in loaded["numbers"]] == [bool, int, float]
    assert loaded["numbers"] == tree["numbers"]


def test_a_number_in_the_template_reads_an_array_of_its_kind(path):
    save(path, {"step": jnp.asarray(12, jnp.int32)})
    assert load(path, like={"step": 0}) == {"step": 12}
    with pytest.raises(ValueError, match=r"step: saved as int32\[\], like has float"):
        load(path, like={"step": 0.0})


def test_without_a_template_nested_dicts_come_back(path):
    save(path, {"a": {"b": [np.ones(2), Pair(np.zeros(1), 3)]}, "c": jnp.ones(())})
    expected = {
        "a": {"b": {"0": np.ones(2), "1": {"first": np.zeros(1), "second": np.asarray(3)}}},
        "c": np.ones((), np.float32),
    }
    loaded = load(path)
    assert_same(loaded, expected)
    loaded["a"]["b"]["0"][:] = 5  # the caller owns what it gets
    assert loaded["a"]["b"]["0"].tolist() == [5, 5]


def test_a_tree_that_is_one_array(path):
    save(path, jnp.arange(3))
    assert_same(load(path), np.arange(3, dtype=np.int32))
    assert_same(load(path, like=jnp.zeros(3, jnp.int32)), jnp.arange(3))


def test_every_path_that_differs_is_named(path):
    save(
        path,
        {"keep": np.ones(2), "gone": np.ones(1), "shape": np.ones((2, 3)), "dtype": np.ones(4, np.float32)}
        | {"key": jax.random.key(0), "raw": np.zeros(2, np.uint32)},
    )
    like = {
        "keep": np.ones(2),
        "new": {"x": np.ones(5)},
        "shape": np.ones((3, 2)),
        "dtype": np.ones(4, np.float16),
    }
    like |= {"key": jax.random.key(0, impl="rbg"), "raw": jax.random.key(0)}
    with pytest.raises(ValueError, match=f"{path.name} does not fit like=, 6 of the paths differ") as caught:
        load(path, like=like)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert sorted(lines) == [
        "dtype: saved as float32[4], like has float16[4]",
        "gone: unexpected, saved as float64[1]",
        "key: saved as key<fry>[], like has key<rbg>[]",
        "new/x: missing, like has float64[5]",
        "raw: saved as uint32[2], like has key<fry>[]",
        "shape: saved as float64[2, 3], like has float64[3, 2]",
    ]


def test_restore_takes_flat_and_nested_dicts():
    like = Pair(np.zeros(2), {"x": jnp.zeros(3)})
    expected = Pair(np.ones(2), {"x": jnp.ones(3)})
    x = np.ones(3, np.float32)
    assert_same(restore(like, {"first": np.ones(2), "second/x": x}), expected)
    assert_same(restore(like, {"first": np.ones(2), "second": {"x": x}}), expected)
    with pytest.raises(ValueError, match=r"state_dict does not fit like=[^:]*:\s+second/x: missing"):
        restore(like, {"first": np.ones(2)})


def test_arrays_are_placed_as_those_of_the_template(path, one_device):
    save(path, {"x": np.ones(2, np.float32)})
    sharding = jax.sharding.SingleDeviceSharding(one_device)
    placed = load(path, like={"x": jax.device_put(np.zeros(2, np.float32), sharding)})["x"]
    assert placed.committed
    assert placed.sharding == sharding
    assert not load(path, like={"x": jnp.zeros(2)})["x"].committed


# Damage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(path):
    save(path, {"a": np.arange(2, dtype=np.float32), "k": jax.random.key(1)})
    return path


def test_a_file_cut_short_anywhere_is_refused(small):
    content = small.read_bytes()
    for size in range(len(content)):
        small.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"{small.name}: .*Expected a whole file as tk.save wrote it"):
            load(small)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_file_altered_in_any_byte_is_refused(small, flip):
    content = small.read_bytes()
    for at in range(len(content)):
        small.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
        with pytest.raises(ValueError, match=f"{small.name}: .*Expected a whole file as tk.save wrote it"):
            load(small)


def test_a_file_with_something_after_its_end_is_refused(small):
    small.write_bytes(small.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="Expected a whole file"):
        load(small)


def test_a_foreign_file_is_refused(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize({"x": np.ones(2)}))
    with pytest.raises(ValueError, match="no trainkit checksum"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"does not begin with the header of tk\.save"):
        load(tmp_path / "x.msgpack")


def test_a_missing_file_is_a_missing_file(path):
    with pytest.raises(FileNotFoundError):
        load(path)


# Other programs -------------------------------------------------------------------------------------------


def test_safetensors_reads_the_file(tmp_path):
    save(tmp_path / "x.safetensors", {"dense": {"kernel": np.arange(6.0).reshape(2, 3).T}})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert_same(found, {"dense/kernel": np.ascontiguousarray(np.arange(6.0).reshape(2, 3).T)})


def test_flax_reads_the_content_behind_the_header(tmp_path):
    tree = {"dense": {"kernel": np.ones((2, 3), np.float32)}}
    save(tmp_path / "x.msgpack", tree)
    content = flax.serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes()[56:])
    assert_same(content["tree"], tree)


@pytest.mark.parametrize("freeze", [False, True])
def test_flax_serialization_of_a_state_works_as_ever(freeze):
    state = make_state(0, freeze=freeze, steps=2)
    template = make_state(5, freeze=freeze)
    state = state.replace(apply_fn=template.apply_fn)
    assert_same(flax.serialization.from_bytes(template, flax.serialization.to_bytes(state)), as_loaded(state))
    as_dict = flax.serialization.to_state_dict(state)
    assert as_dict["opt_state"]["0"] == {}  # the state of clipping is empty
    assert_same(flax.serialization.from_state_dict(template, as_dict), state)


def as_loaded(state):
    """`from_bytes` gives NumPy arrays for everything but the key, which the state wraps anew."""

    def loaded(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)

    return jax.tree.map(loaded, state)


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.npz", "x", "x.safetensors.bak"])
def test_an_unknown_suffix_names_the_two_there_are(tmp_path, name):
    for act in (lambda: save(tmp_path / name, {}), lambda: load(tmp_path / name)):
        with pytest.raises(ValueError, match=r"\*\.safetensors or \*\.msgpack"):
            act()


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "the path a/b is used twice"),
        ({"a/b": np.ones(1), "a": np.ones(1)}, ValueError, "the path a is a leaf and also holds a/b"),
        ({"__metadata__": np.ones(1)}, ValueError, "__metadata__ is reserved"),
        ({"a": {"name": "text"}}, TypeError, "a/name is of type str"),
        ({"a": np.array(["text"])}, TypeError, "a has dtype <U4"),
        ({"a": np.array([None])}, TypeError, "a has dtype object"),
        ({"a": np.zeros(2, "datetime64[s]")}, TypeError, "a has dtype datetime64"),
        ({"a": np.zeros(2, [("x", "f4")])}, TypeError, "a has dtype"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(path, tree, error, message):
    with pytest.raises(error, match=message):
        save(path, tree)
    assert not path.exists()


def test_a_key_with_a_slash_comes_back_with_a_template(path):
    tree = {"mlp/linear": {"w": np.ones(2)}}
    save(path, tree)
    assert_same(load(path, like=tree), tree)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'trainkit\[export\]'"):
        save(tmp_path / "x.safetensors", {"x": np.ones(2)})
    save(tmp_path / "x.msgpack", {"x": np.ones(2)})


# Atomicity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, call):
    save(path, {"x": np.ones(2)})

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(trainkit._core.atomic.os, call, fail)
        with pytest.raises(OSError, match="no space left"):
            save(path, {"x": np.zeros(2)})
    assert os.listdir(path.parent) == [path.name]
    assert_same(load(path), {"x": np.ones(2)})


CHILD = """
import resource, sys
import numpy as np
from trainkit.export._serialize import save
path, mode = sys.argv[1:]
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    save(path, {"x": np.zeros(100_000)})
value = 0
while mode == "forever":
    value += 1
    save(path, {"x": np.full(300_000, value)})
    print(value, flush=True)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    save(path, {"x": np.ones(2)})
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path, "limit"], capture_output=True, text=True, timeout=120, check=False
    )
    assert "OSError: [Errno 27] File too large" in child.stderr
    assert os.listdir(path.parent) == [path.name]
    assert_same(load(path), {"x": np.ones(2)})


@pytest.mark.parametrize("saves", [1, 2, 5])
def test_a_kill_in_the_middle_leaves_a_whole_file(path, saves):
    command = [sys.executable, "-c", CHILD, path, "forever"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(saves):
            assert child.stdout.readline()
        child.kill()
    x = load(path)["x"]
    assert x[0] >= saves
    assert (x == x[0]).all()


def test_a_new_file_has_the_permissions_of_any_other(path):
    old = os.umask(0o027)
    try:
        save(path, {"x": np.ones(2)})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_stays_one(path):
    target = path.with_name(f"target{path.suffix}")
    save(target, {"x": np.zeros(2)})
    path.symlink_to(target.name)
    save(path, {"x": np.ones(2)})
    assert path.is_symlink()
    assert_same(load(target), {"x": np.ones(2)})


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        save(tmp_path / "missing" / "x.msgpack", {"x": np.ones(2)})


@pytest.mark.parametrize("suffix", ["msgpack", "safetensors"])
def test_keys_of_dicts_come_back_as_they_were_without_a_template(tmp_path, suffix):
    one = np.ones(2, np.float32)
    tree = {"stats": {"Dense_0/kernel/u": one, "plain": one}, "groups": {0: one, 7: {"a": one}}, "0": one}
    save(tmp_path / f"tree.{suffix}", tree)
    loaded = load(tmp_path / f"tree.{suffix}")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    again = load(tmp_path / f"tree.{suffix}", like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
