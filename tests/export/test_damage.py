"""Files whose checksum is right and whose content is not what `save` writes: refused by name, in bounded memory."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

import trainkit as tk
from trainkit.export._program import KNOWN_CALLS, calls_of, read_program
from trainkit.export._safetensors import _CHECKSUM, _digest, decode, encode

TREE = {"trainkit.kind": "tree", "trainkit.keys": "{}", "trainkit.paths": "{}"}
DEEP = "[" * 50_000 + "]" * 50_000


def in_bounds(load, path):
    """Loads a file, which must be refused by name in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"{path.name}: .*Expected a whole file as tk\.(export\.)?save wrote it"
        ):
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * path.stat().st_size + 4_000_000


# Trees ----------------------------------------------------------------------------------------------------

X = np.zeros(2, np.uint32)
SAFETENSORS = {
    "no kinds of keys as text": ({"x": X}, {**TREE, "trainkit.keys": "nothing"}),
    "keys in a list": ({"x": X}, {**TREE, "trainkit.keys": "[]"}),
    "deep keys": ({"x": X}, {**TREE, "trainkit.keys": DEEP}),
    "keys that are numbers": ({"x": X}, {**TREE, "trainkit.keys": '{"x": 3}'}),
    "another generator": ({"x": X}, {**TREE, "trainkit.keys": '{"x": "dice"}'}),
    "keys of another shape": ({"x": X[:1]}, {**TREE, "trainkit.keys": '{"x": "threefry2x32"}'}),
    "keys of floats": ({"x": X.astype("f4")}, {**TREE, "trainkit.keys": '{"x": "threefry2x32"}'}),
    "deep paths": ({"x": X}, {**TREE, "trainkit.paths": DEEP}),
    "a path that is none": ({"x": X}, {**TREE, "trainkit.paths": '{"x": 3}'}),
    "a path of another": ({"x": X}, {**TREE, "trainkit.paths": '{"x": ["y"]}'}),
    "a path of lists": ({"x": X}, {**TREE, "trainkit.paths": '{"x": [["x"]]}'}),
    "an array and a branch": ({"x": X, "x/y": X}, TREE),
    "a branch and an array": ({"x/y": X, "x": X}, TREE),
    "a way without end": ({"x" + "/x" * 50_000: X}, TREE),
    "another kind": ({"x": X}, {**TREE, "trainkit.kind": "artifact"}),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_is_no_tree_of_ours(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(*SAFETENSORS[name]))
    in_bounds(tk.load, path)


def headed(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, size, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def honest(shape, dtype="float32"):
    """Returns a header whose checksum is right, for an array without elements."""
    digest = hashlib.sha256(json.dumps([[["x", dtype, shape]], TREE], sort_keys=True).encode()).hexdigest()
    return {"__metadata__": {**TREE, _CHECKSUM: digest}, **entry(shape, 0)}


HEADERS = {
    "nothing": b"",
    "claims more than there is": struct.pack("<Q", 2**63) + b"{}",
    "claims a gigabyte": headed(entry([2**28], 2**30), b"1234"),
    "sizes that wrap around": headed(entry([2**62, 4], 0)),
    "gigantic and empty": headed(honest([0, 2**62])),
    "many gigantic and empty": headed(honest([0, *[2**60] * 50])),
    "many dimensions": headed(honest([0, *[1] * 100])),
    "deep": headed(DEEP.encode()),
    "deep within": headed(b'{"__metadata__": ' + DEEP.encode() + b"}"),
    "half bytes": headed(entry([2], 1, "F4"), b"1"),
    "a dtype of another day": headed(entry([1], 1, "F8_E8M0"), b"1"),
    "metadata that is no text": headed({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_claims_what_is_not_there(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    in_bounds(tk.load, path)


def test_the_digest_of_the_cases_above_is_the_real_one():
    arrays = {"x": np.zeros((0, 3), np.float32)}
    assert honest([0, 3])["__metadata__"][_CHECKSUM] == _digest(arrays, TREE)


def wrapped(payload):
    digest = hashlib.sha256(payload).digest()
    return b"trainkit.msgpack" + digest + len(payload).to_bytes(8, "little") + payload


def an_array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def tree(content, **changes):
    return msgpack.packb({"keys": {}, "paths": "{}", "tree": content, **changes})


def nested(levels):
    content = X.tobytes()
    for _ in range(levels):
        content = {"x": content}
    return content


MSGPACK = {
    "nothing": b"",
    "no msgpack": b"\xc1" * 20,
    "a number": b"\x01",
    "a list": b"\x90",
    "claims an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "claims a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "claims 4 GB": b"\xc6\xff\xff\xff\xff",
    "claims 4 GB of an array": b"\xc9\xff\xff\xff\xff\x01",
    "deep": b"\x91" * 50_000 + b"\x90",
    "deep maps": b"\x81\xa1x" * 50_000 + b"\x80",
    "deep arrays": tree(nested(900)),
    "no tree": msgpack.packb({"keys": {}}),
    "no keys": msgpack.packb({"tree": {}}),
    "text for an array": tree({"x": "text"}),
    "a number for an array": tree({"x": 3}),
    "a list for an array": tree([1, 2]),
    "an array of another size": tree({"x": an_array([3], "float32", b"1234")}),
    "an array of a terabyte": tree({"x": an_array([2**38], "float32", b"1234")}),
    "objects": tree({"x": an_array([1], "object", b"12345678")}),
    "an unknown dtype": tree({"x": an_array([1], "float33", b"1234")}),
    "texts": tree({"x": an_array([1], "S4", b"1234")}),
    "an array of rubbish": tree({"x": msgpack.ExtType(1, b"\xc1")}),
    "a complex of rubbish": tree({"x": msgpack.ExtType(2, b"\x90")}),
    "an unknown extension": tree({"x": msgpack.ExtType(7, b"1234")}),
    "chunks of nothing": tree({"__msgpack_chunked_array__": True}),
    "chunks that are none": tree(
        {"x": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": 3}}}
    ),
    "keys in a list": tree({"x": an_array([2], "uint32", bytes(8))}, keys=[]),
    "keys of another generator": tree({"x": an_array([2], "uint32", bytes(8))}, keys={"x": "dice"}),
    "paths that are a number": tree({}, paths=3),
    "paths that are a list": tree({}, paths="[]"),
    "deep paths": tree({}, paths=DEEP),
    "text and number": tree({"x": an_array([1], "int8", b"1"), 3: an_array([1], "int8", b"1")}),
}


@pytest.mark.parametrize("name", MSGPACK)
def test_a_msgpack_file_that_is_no_tree_of_ours(tmp_path, name):
    path = tmp_path / "x.msgpack"
    path.write_bytes(wrapped(MSGPACK[name]))
    in_bounds(tk.load, path)


def test_how_deep_a_tree_may_be_is_a_rule_of_both_sides(tmp_path):
    content = np.zeros(1)
    for _ in range(201):
        content = {"x": content}
    for suffix in ("msgpack", "safetensors"):
        path = tmp_path / f"x.{suffix}"
        tk.save(path, content)
        assert len(jax.tree.leaves(tk.load(path))) == 1
        with pytest.raises(ValueError, match="more than 200 deep; flatten the tree"):
            tk.save(path, {"x": content})


@pytest.mark.parametrize("load", [tk.load, tk.export.load], ids=["tree", "model"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "a link to a pipe", "a device"])
def test_what_is_no_file_is_named_and_nothing_hangs(tmp_path, load, kind):
    path, odd = tmp_path / "x.msgpack", tmp_path / "odd"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "a link to a pipe": lambda: (os.mkfifo(odd), path.symlink_to(odd)),
        "a device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(OSError, match=r"is a (pipe|folder|device), where a regular file is expected"):
        load(path)


def test_a_link_to_a_file_is_followed(tmp_path):
    tk.save(tmp_path / "step_3.msgpack", {"x": X})
    (tmp_path / "latest.msgpack").symlink_to("step_3.msgpack")
    np.testing.assert_array_equal(tk.load(tmp_path / "latest.msgpack")["x"], X)


def test_whatever_becomes_of_the_content_it_is_a_value_error(tmp_path):
    """Bytes changed behind a checksum that is made anew."""
    chance, path = random.Random(3), tmp_path / "x.msgpack"
    tk.save(path, {"a": {"w": np.ones((2, 3)), "k": jax.random.key(1)}, "b/c": np.int8(3)})
    payload = path.read_bytes()[56:]
    for _ in range(400):
        changed = bytearray(payload)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.choice((chance.randrange(256), 0xFF, 0xDD, 0xC9))
        path.write_bytes(wrapped(bytes(changed)))
        try:
            tk.load(path)
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017 (most changes are refused, some are not seen)


# Models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The file of a small model: tensors and metadata."""
    path, x = tmp_path_factory.mktemp("model") / "x.tk", np.ones((2, 3), np.float32)
    tk.export.save(path, (nn.Dense(4), nn.Dense(4).init(jax.random.key(0), x)), x, platforms=("cpu",))
    return decode(path.read_bytes())


def written(tmp_path, model, tensors=None, without=None, **changes):
    """Writes the model with changes to its tensors or its description, under a checksum that is right."""
    arrays, metadata = model
    said = json.loads(metadata["trainkit.spec"])
    said = {name: value for name, value in {**said, **changes}.items() if name != without}
    path = tmp_path / "x.tk"
    arrays = {name: array for name, array in {**arrays, **(tensors or {})}.items() if array is not None}
    path.write_bytes(encode(arrays, {**metadata, "trainkit.spec": json.dumps(said)}))
    return path


SPEC = {"shape": ["batch", 3], "dtype": "float32", "given": ""}
DESCRIPTIONS = {
    "inputs that are a number": {"inputs": 3},
    "inputs that are no pairs": {"inputs": [["input"]]},
    "an input without a name": {"inputs": [[3, SPEC]]},
    "an input twice": {"inputs": [["input", SPEC], ["input", SPEC]]},
    "an input more": {"inputs": [["input", SPEC], ["other", SPEC]]},
    "an input without a shape": {"inputs": [["input", {"dtype": "float32", "given": ""}]]},
    "an input that is text": {"inputs": [["input", "float32"]]},
    "a negative size": {"inputs": [["input", {**SPEC, "shape": ["batch", -3]}]]},
    "an input of objects": {"inputs": [["input", {**SPEC, "dtype": "object"}]]},
    "no outputs": {"outputs": []},
    "weights that are numbers": {"weights": [1, 2]},
    "a weight that is not there": {"weights": ["params/Dense_0/kernel"]},
    "a weight less": {"weights": ["params/kernel"]},
    "weights in another order": {"weights": ["params/kernel", "params/bias"]},
    "no platforms": {"platforms": "cpu"},
    "versions that are a list": {"versions": []},
    "spread": {"spread": 1},
    "another structure": {"structure": 1},
    "a leaf twice": {"structure": {"tuple": [0, 0]}},
    "a structure of nothing": {"structure": None},
    "an unknown structure": {"structure": {"set": [0]}},
    "two structures": {"structure": {"list": [0], "tuple": []}},
    "a key that is a list": {"structure": {"dict": [[[], 0]]}},
    "a deep structure": {"structure": json.loads('{"list": [' * 400 + "0" + "]}" * 400)},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_is_none_of_ours(tmp_path, model, name):
    in_bounds(tk.export.load, written(tmp_path, model, **DESCRIPTIONS[name]))


@pytest.mark.parametrize(
    "name", ["versions", "platforms", "inputs", "outputs", "weights", "structure", "spread"]
)
def test_a_description_that_lacks_something(tmp_path, model, name):
    in_bounds(tk.export.load, written(tmp_path, model, without=name))


@pytest.mark.parametrize("name", ["program", "weights/params/kernel"])
def test_a_tensor_that_is_not_there(tmp_path, model, name):
    in_bounds(tk.export.load, written(tmp_path, model, tensors={name: None}))


def test_a_program_that_is_none(tmp_path, model):
    chance = random.Random(5)
    program = model[0]["program"]
    noise = np.frombuffer(chance.randbytes(2000), np.uint8)
    for changed in (program[:0], program[: len(program) // 2], program[::-1], noise, np.zeros(64, np.uint8)):
        in_bounds(
            tk.export.load, written(tmp_path, model, tensors={"program": np.ascontiguousarray(changed)})
        )


# The calls of a program -----------------------------------------------------------------------------------


def exported(function, x, *, allow=(), platforms=("cpu",)):
    """Returns a program as `tk.export.save` makes one, for any batch size, with calls that JAX would refuse."""
    (batch,) = jax.export.symbolic_shape("batch")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in allow]
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    lower = jax.export.export(
        jax.jit(lambda x: jax.tree.leaves(function(x))), platforms=platforms, disabled_checks=checks
    )
    return lower(shape).serialize()


FOREIGN = "xla_ffi_python_cpu_callback"


def foreign(x):
    """Calls a Python function by its number, in a process that has none."""
    return jax.ffi.ffi_call(FOREIGN, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, index=np.uint64(5))


def test_a_foreign_call_is_refused_by_name_before_it_ends_the_process(tmp_path, model):
    program = np.frombuffer(_with_weights(model), np.uint8)
    path = written(tmp_path, model, tensors={"program": program})
    with pytest.raises(
        ValueError, match=rf"x\.tk: its program calls '{FOREIGN}', which no model exported by tk"
    ):
        tk.export.load(path)
    # What would have happened.
    (tmp_path / "program").write_bytes(program.tobytes())
    code = """
import sys, jax, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print("deserialised", flush=True)
program.call([np.zeros(4, np.float32), np.zeros((3, 4), np.float32)], [np.ones((2, 3), np.float32)])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "program"], capture_output=True, text=True)
    assert done.stdout == "deserialised\n", done.stderr
    assert done.returncode < 0


def _with_weights(model):
    """Returns a program with the arguments of the model that makes the foreign call."""
    (batch,) = jax.export.symbolic_shape("batch")
    weights = [
        jax.ShapeDtypeStruct(model[0][f"weights/params/{name}"].shape, "float32")
        for name in ("bias", "kernel")
    ]
    allow = [jax.export.DisabledSafetyCheck.custom_call(FOREIGN)]
    lower = jax.export.export(
        jax.jit(lambda w, x: [foreign(x[0])]), platforms=("cpu",), disabled_checks=allow
    )
    return lower(weights, [jax.ShapeDtypeStruct((batch, 3), "float32")]).serialize()


@pytest.mark.parametrize(
    "name", ["abort", 'with "quotes"', "shape_assertion.not", "__gpu$xla.gpu.triton", "Sharding "]
)
def test_other_names_are_refused_too(name):
    def call(x):
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(ValueError, match="its program calls"):
        read_program(bytes(exported(call, np.ones((2, 3), np.float32), allow=[name])), {})


def square(function):
    return function, np.ones((2, 3, 3), np.float32)


def flat(function):
    return function, np.ones((2, 8), np.float32)


ORDINARY = {
    "cholesky": square(jnp.linalg.cholesky),
    "eigh": square(jnp.linalg.eigh),
    "svd": square(jnp.linalg.svd),
    "qr": square(jnp.linalg.qr),
    "solve": square(lambda x: jnp.linalg.solve(x, x)),
    "expm": square(lambda x: jax.vmap(jax.scipy.linalg.expm)(x)),
    "attention": square(
        lambda x: nn.MultiHeadDotProductAttention(1).init_with_output(jax.random.key(0), x)[0]
    ),
    "sort": flat(lambda x: jnp.sort(x, axis=-1)),
    "top_k": flat(lambda x: jax.lax.top_k(x, 3)),
    "approximate top_k": flat(lambda x: jax.lax.approx_max_k(x, 3)),
    "fft": flat(lambda x: jnp.abs(jnp.fft.fft(x))),
    "dropout": flat(
        lambda x: nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})
    ),
    "rbg": flat(lambda x: x + jax.random.normal(jax.random.key(0, impl="rbg"), x.shape)),
    "scan": flat(lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[:, 0], x.T)),
    "convolution": flat(lambda x: nn.Conv(2, (3,)).init_with_output(jax.random.key(0), x[..., None])[0]),
    "batch norm": flat(
        lambda x: nn.BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), x)[0]
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_models_call_is_known(name):
    content = bytes(exported(*ORDINARY[name], platforms=("cpu", "cuda", "tpu")))
    program = read_program(content, {})
    assert calls_of(program.mlir_module()) >= {"shape_assertion"}


def test_what_jax_calls_stable_is_known_or_left_out_on_purpose():
    stable = jax._src.export._export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
    assert stable - KNOWN_CALLS == {"tf.call_tf_function"}
    assert stable >= KNOWN_CALLS
