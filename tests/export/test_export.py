"""`tk.export`: one file gives the model's outputs for any batch size, where the model's code is not there."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import trainkit as tk
import trainkit._core.atomic
from tests.helpers.compilations import count_compilations
from trainkit import export
from trainkit.export._serialize import load as load_tree
from trainkit.export._serialize import save as save_tree

ROOT = Path(__file__).resolve().parents[2]
SIZES = [1, 2, 7, 64]


class Classifier(nn.Module):
    """Convolution, batch statistics, dropout: what differs between training and prediction."""

    @nn.compact
    def __call__(self, image, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(image)))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape((image.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {"logits": nn.Dense(10)(x), "norms": [jnp.linalg.norm(x, axis=-1)]}


class Encoder(nn.Module):
    """Attention over tokens with a mask, several arguments, one of them 0-d, in bfloat16."""

    def setup(self):
        self.embed = nn.Embed(11, 16, dtype=jnp.bfloat16)
        self.attend = nn.MultiHeadDotProductAttention(2, dtype=jnp.bfloat16)

    def __call__(self, batch, temperature):
        return self.encode(batch)[:, 0] / temperature

    def encode(self, batch):
        x = self.embed(batch["tokens"])
        return self.attend(x, mask=batch["real"][:, None, None, :]).astype(jnp.float32)


def images(rows, seed=0):
    return np.random.default_rng([rows, seed]).normal(size=(rows, 8, 8, 1)).astype(np.float32)


def sentences(rows):
    generator = np.random.default_rng(rows)
    tokens = generator.integers(0, 11, size=(rows, 5)).astype(np.int32)
    return {"tokens": tokens, "real": tokens < 9}, np.float32(0.7)


@pytest.fixture(scope="module")
def classifier():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Classifier().init(keys, images(2))
    # Statistics that are not the initial ones: an export that trains or leaves them out would differ.
    _, updated = Classifier().apply(
        variables, images(16), rngs={"dropout": keys["dropout"]}, mutable=["batch_stats"]
    )
    return Classifier(), {**variables, **updated}


@pytest.fixture(scope="module")
def artifact(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "classifier.tk"
    export.save(path, classifier, images(3), kwargs={"train": False})
    return path


def run(code, *arguments, env=None, python=sys.executable, cwd=None):
    """Runs `code` in a fresh interpreter that has trainkit and no tests on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUMPY_RANK_PROMOTION": "raise", **(env or {})}
    process = subprocess.run(
        [python, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=environment,
        cwd=cwd,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


LOADER = """
    import importlib.util, sys
    import jax, numpy as np
    from trainkit import export
    assert importlib.util.find_spec("test_export") is None
    model = export.load(sys.argv[1])
    given = np.load(sys.argv[2])
    found = {}
    for size in {name.split("|")[0] for name in given}:
        inputs = {name.split("|")[1]: given[name] for name in given if name.split("|")[0] == size}
        if sys.argv[4] == "image":
            outputs = model(inputs["image"])
        else:
            outputs = model({"tokens": inputs["tokens"], "real": inputs["real"]}, inputs["temperature"])
        for number, leaf in enumerate(jax.tree.leaves(outputs)):
            found[f"{size}|{number}"] = leaf
    np.savez(sys.argv[3], **found)
"""


def outputs_elsewhere(path, inputs, kind, tmp_path):
    """Outputs of the artifact by size, from a process that cannot import the model."""
    np.savez(tmp_path / "in.npz", **{f"{s}|{k}": v for s, given in inputs.items() for k, v in given.items()})
    run(LOADER, path, tmp_path / "in.npz", tmp_path / "out.npz", kind, cwd=tmp_path)
    found = np.load(tmp_path / "out.npz")
    return {
        size: [found[f"{size}|{n}"] for n in range(sum(k.split("|")[0] == str(size) for k in found))]
        for size in inputs
    }


def assert_outputs(actual, expected):
    """Equal to rounding: the session compiles without most optimisations, which fuses two programs differently."""
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        got, want = np.asarray(got), np.asarray(want)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        tolerance = 1e-2 if got.dtype.itemsize == 2 else 2e-6
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance)


# Outputs --------------------------------------------------------------------------------------------------


def test_outputs_are_the_models_where_its_code_is_not_importable(classifier, artifact, tmp_path):
    module, variables = classifier
    model = jax.jit(lambda image: module.apply(variables, image, train=False))
    found = outputs_elsewhere(artifact, {n: {"image": images(n)} for n in SIZES}, "image", tmp_path)
    for size in SIZES:
        assert_outputs(found[size], jax.tree.leaves(model(images(size))))


def test_several_arguments_a_0d_input_and_bfloat16(tmp_path):
    batch, temperature = sentences(2)
    variables = Encoder().init(jax.random.key(0), batch, temperature)
    export.save(tmp_path / "encoder.tk", (Encoder(), variables), (batch, temperature))
    inputs = {n: {**sentences(n)[0], "temperature": sentences(n)[1]} for n in SIZES}
    found = outputs_elsewhere(tmp_path / "encoder.tk", inputs, "sentences", tmp_path)
    model = jax.jit(Encoder().apply)
    for size in SIZES:
        assert_outputs(found[size], [model(variables, *sentences(size))])
    loaded = export.load(tmp_path / "encoder.tk")
    assert {name: str(spec) for name, spec in loaded.inputs.items()} == {
        "0/real": "bool[batch, 5]",
        "0/tokens": "int32[batch, 5]",
        "1": "float32[]",
    }
    assert {name: str(spec) for name, spec in loaded.outputs.items()} == {"output": "float32[batch, 16]"}


@pytest.mark.parametrize("method", ["encode", Encoder.encode], ids=["name", "function"])
def test_another_method(tmp_path, method):
    batch, temperature = sentences(2)
    variables = Encoder().init(jax.random.key(0), batch, temperature)
    export.save(tmp_path / "encode.tk", (Encoder(), variables), batch, method=method)
    expected = jax.jit(lambda b: Encoder().apply(variables, b, method="encode"))(sentences(5)[0])
    assert_outputs([export.load(tmp_path / "encode.tk")(sentences(5)[0])], [expected])


def test_what_is_said_of_an_artifact(artifact):
    model = export.load(artifact)
    assert model.inputs == {"input": export.ArraySpec(("batch", 8, 8, 1), "float32")}
    assert model.outputs == {
        "logits": export.ArraySpec(("batch", 10), "float32"),
        "norms/0": export.ArraySpec(("batch",), "float32"),
    }
    assert model.platforms == ("cpu", "cuda", "tpu")
    assert model.versions == {
        "trainkit": tk.__version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    assert repr(model) == (
        "Exported(input float32[batch, 8, 8, 1] -> logits float32[batch, 10], norms/0 float32[batch]; "
        "cpu, cuda, tpu)"
    )


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Result:
    pair: Pair
    nothing: None
    several: tuple


class Structured(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Result(Pair(x, 2 * x), None, (x.sum(), [x.reshape(-1)], {"k": x > 0}))


def test_named_tuples_and_dataclasses_come_back_as_dicts(tmp_path):
    export.save(tmp_path / "x.tk", (Structured(), {}), images(2))
    model, x = export.load(tmp_path / "x.tk"), images(3)
    found = jax.tree.map(np.asarray, model(x))
    assert {name for name in found if found[name] is not None} == {"pair", "several"}
    np.testing.assert_array_equal(found["pair"]["second"], 2 * x)
    total, (flat,), positive = found["several"]
    assert total.shape == ()
    np.testing.assert_array_equal(flat, x.reshape(-1))
    np.testing.assert_array_equal(positive["k"], x > 0)
    assert model.outputs["several/1/0"].shape == ("64*batch",)


def test_weights_are_stored_once_beside_the_program(tmp_path):
    module = nn.Dense(1000)
    variables = module.init(jax.random.key(0), np.zeros((1, 1000), np.float32))
    export.save(tmp_path / "dense.tk", (module, variables), np.zeros((2, 1000), np.float32))
    tensors = dict(safetensors.numpy.load_file(tmp_path / "dense.tk"))
    np.testing.assert_array_equal(tensors["weights/params/kernel"], variables["params"]["kernel"])
    assert tensors["program"].nbytes < 20_000
    assert (tmp_path / "dense.tk").stat().st_size < 4_004_000 + 30_000


def test_typed_keys_among_the_variables(tmp_path):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            key = self.variable("keys", "noise", lambda: jax.random.key(5)).value
            return x + jax.random.normal(key, x.shape)

    variables = Noisy().init(jax.random.key(0), images(2))
    export.save(tmp_path / "noisy.tk", (Noisy(), variables), images(2))
    expected = jax.jit(lambda x: x + jax.random.normal(jax.random.key(5), x.shape))(images(4))
    assert_outputs([export.load(tmp_path / "noisy.tk")(images(4))], [expected])


def test_a_batch_size_compiles_once(artifact):
    model = export.load(artifact)
    with jax.log_compiles(False), count_compilations() as count:
        for _ in range(3):
            model(images(3))
            model(images(5))
    assert count() == 2


# Trainers -------------------------------------------------------------------------------------------------


class Linear:
    """The least that can be exported whole: two sets of weights and a function."""

    def __init__(self):
        self.asked = []

    def _exportable(self, weights):
        self.asked.append(weights)
        scale = {"averaged": 2.0, "live": 3.0}[weights]
        return lambda arrays, batch: {"y": batch["x"] * arrays["scale"]}, {"scale": np.float32(scale)}


def test_an_object_that_exports_itself(tmp_path):
    source, x = Linear(), images(3)
    export.save(tmp_path / "ema.tk", source, {"x": x})
    export.save(tmp_path / "live.tk", source, {"x": x}, weights="live")
    assert source.asked == ["averaged", "live"]
    assert_outputs([export.load(tmp_path / "ema.tk")({"x": images(7)})["y"]], [2 * images(7)])
    assert_outputs([export.load(tmp_path / "live.tk")({"x": images(7)})["y"]], [3 * images(7)])


class ClassifierTrainer(tk.Trainer):
    def loss(self, model, batch, ctx):
        logits = model(batch["image"], train=ctx.train)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]), {}

    def predict_step(self, model, batch, ctx):
        outputs = model(batch["image"], train=ctx.train)
        return {"logits": outputs["logits"], "label": outputs["logits"].argmax(-1)}


@pytest.fixture(scope="module")
def trained():
    trainer = ClassifierTrainer(Classifier(), optax.adam(1e-2), callbacks=[tk.callbacks.EMA(0.9)])
    labels = np.arange(16, dtype=np.int32) % 10
    trainer.fit([{"image": images(16, seed), "label": labels} for seed in range(4)], steps=4)
    return trainer


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_of_a_trainer_the_prediction_is_exported(trained, tmp_path, weights):
    export.save(tmp_path / "trained.tk", trained, {"image": images(2)}, weights=weights)
    model = export.load(tmp_path / "trained.tk")
    state = trained.state
    chosen = tk.callbacks.EMA.view(state) if weights == "ema" else state
    plain = jax.jit(lambda variables, image: Classifier().apply(variables, image, train=False)["logits"])
    for size in SIZES:
        expected = np.asarray(plain(chosen.variables, images(size)))
        found = model({"image": images(size)})
        # Fused otherwise than the hand-written call; within a program compiled alike they agree bit for bit.
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-6, atol=1e-6)
        assert_outputs(
            [found[name] for name in ("label", "logits")],
            [
                trained.predict([{"image": images(size)}], weights=weights)[name]
                for name in ("label", "logits")
            ],
        )


def test_exporting_leaves_the_trainer_as_it_was(trained, tmp_path):
    before = jax.tree.map(np.array, trained.state.params)
    export.save(tmp_path / "trained.tk", trained, {"image": images(2)})
    jax.tree.map(np.testing.assert_array_equal, before, trained.state.params)


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            lambda x: x.astype(np.float64),
            ["input: got float64[4, 8, 8, 1], expected float32[batch, 8, 8, 1]"],
        ),
        (lambda x: x[:, :5], ["input: got float32[4, 5, 8, 1], expected float32[batch, 8, 8, 1]"]),
        (lambda x: x[0], ["input: got float32[8, 8, 1], expected float32[batch, 8, 8, 1]"]),
        (lambda x: x[:0], ["input: got float32[0, 8, 8, 1], expected float32[batch, 8, 8, 1]"]),
        (lambda x: {"image": x}, ["input: missing, expected float32[batch, 8, 8, 1]", "image: unexpected"]),
        (lambda x: 3.0, ["input: got float64[], expected float32[batch, 8, 8, 1]"]),
    ],
)
def test_an_input_that_does_not_fit_is_named(artifact, given, lines):
    with pytest.raises(ValueError, match="the inputs do not fit the exported model") as caught:
        export.load(artifact)(given(images(4)))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == lines


def test_each_input_that_does_not_fit_is_named(tmp_path):
    batch, temperature = sentences(2)
    variables = Encoder().init(jax.random.key(0), batch, temperature)
    export.save(tmp_path / "encoder.tk", (Encoder(), variables), (batch, temperature))
    model = export.load(tmp_path / "encoder.tk")
    with pytest.raises(ValueError, match="batch is 2 here") as caught:
        model({"tokens": batch["tokens"][:1], "real": batch["real"], "more": batch["real"]})
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "1: missing, expected float32[]",
        "0/more: unexpected",
        "0/tokens: got int32[1, 5], expected int32[batch, 5]",
    ]


def test_another_number_of_arguments_is_refused(artifact):
    with pytest.raises(
        TypeError, match=r"got 2 arguments; the exported model takes one, input float32\[batch"
    ):
        export.load(artifact)(images(1), images(1))


def test_an_example_in_64_bits_is_accepted_as_jax_narrows_it(tmp_path):
    source = Linear()
    export.save(tmp_path / "x.tk", source, {"x": np.arange(3)})
    model = export.load(tmp_path / "x.tk")
    assert str(model.inputs["x"]) == "int32[batch]"
    for dtype in (np.int64, np.int32):
        assert_outputs([model({"x": np.arange(4, dtype=dtype)})["y"]], [np.arange(4, dtype=np.float32) * 2])


def test_a_file_cut_short_or_altered_is_refused(artifact, tmp_path):
    content, path = artifact.read_bytes(), tmp_path / "x.tk"
    for size in [*range(0, len(content), 101), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.tk: .*Expected a whole file as tk\.export\.save wrote it"):
            export.load(path)
    for at in range(0, len(content), 101):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"x\.tk: .*Expected a whole file as tk\.export\.save wrote it"):
            export.load(path)


def test_the_two_kinds_of_file_are_told_apart(artifact, tmp_path):
    shutil.copy(artifact, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it holds another kind of content, 'artifact'"):
        load_tree(tmp_path / "model.safetensors")
    save_tree(tmp_path / "tree.safetensors", {"x": np.ones(2)})
    with pytest.raises(ValueError, match="it holds another kind of content, 'tree'"):
        export.load(tmp_path / "tree.safetensors")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(classifier, tmp_path, monkeypatch):
    path = tmp_path / "x.tk"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(trainkit._core.atomic.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        export.save(path, classifier, images(2), kwargs={"train": False})
    assert os.listdir(tmp_path) == ["x.tk"]
    assert path.read_bytes() == b"old"


DENSE = nn.Dense(2)


@pytest.mark.parametrize(
    ("source", "example", "options", "error", "message"),
    [
        ((DENSE, {}), {"a": images(2), "b": images(3)}, {}, ValueError, "must be the same. Found: a 2, b 3"),
        ((DENSE, {}), np.float32(1), {}, ValueError, "Found: none, all inputs are 0-d"),
        ((DENSE, {}), {"a": "text"}, {}, TypeError, "example has a as str"),
        ((DENSE, {}), {"a": np.array(["text"])}, {}, TypeError, "example has a as <U4"),
        ((DENSE, {}), {"a": jax.random.key}, {}, TypeError, "example has a as function"),
        ((nn.Dense, {}), images(2), {}, TypeError, "source has the class .*Dense"),
        ((DENSE, None), images(2), {}, TypeError, "source has variables of type NoneType"),
        (DENSE, images(2), {}, TypeError, "source is Dense; expected a trainer, or a pair"),
        ((DENSE, {}, 1), images(2), {}, TypeError, "source is a tuple of 3"),
        (
            (DENSE, {}),
            images(2),
            {"weights": "best"},
            ValueError,
            "the choices are 'averaged', 'ema' and 'live'",
        ),
        (
            (DENSE, {}),
            images(2),
            {"platforms": "cpu"},
            ValueError,
            "platforms='cpu': give one or more of 'cpu', 'cuda'",
        ),
        ((DENSE, {}), images(2), {"platforms": ("gpu",)}, ValueError, "give one or more of 'cpu', 'cuda'"),
        (
            Linear(),
            {"x": images(2)},
            {"kwargs": {"train": False}},
            ValueError,
            "of a trainer predict_step is exported",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, source, example, options, error, message):
    with pytest.raises(error, match=message):
        export.save(tmp_path / "x.tk", source, example, **options)
    assert os.listdir(tmp_path) == []


def test_a_model_for_one_batch_size_is_refused_with_the_cure(tmp_path):
    class Choosy(nn.Module):
        def __call__(self, x):
            return x + 1 if x.shape[0] > 3 else x

    with pytest.raises(jax.errors.InconclusiveDimensionOperation) as caught:
        export.save(tmp_path / "x.tk", (Choosy(), {}), images(2))
    assert any("exported for every batch size" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("package", ["flatbuffers", "safetensors.numpy"])
def test_without_a_package_the_extra_is_named(classifier, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'trainkit\[export\]'"):
        export.save(tmp_path / "x.tk", classifier, images(2), kwargs={"train": False})


def test_a_model_in_64_bits_says_what_to_set(tmp_path):
    code = """
        import sys
        import jax, numpy as np
        from trainkit import export
        class Half:
            def apply(self, variables, x):
                return x * variables["scale"]
        export.save(sys.argv[1], (Half(), {"scale": np.float64(0.5)}), np.ones(2))
        print(export.load(sys.argv[1])(np.ones(3)).dtype)
    """
    assert run(code, tmp_path / "x.tk", env={"JAX_ENABLE_X64": "1"}).strip() == "float64"
    with pytest.raises(ValueError, match=r"computes in float64.*jax_enable_x64"):
        export.load(tmp_path / "x.tk")


# TensorFlow -----------------------------------------------------------------------------------------------


def test_saved_model_without_tensorflow_names_the_extra(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"pip install 'trainkit\[tensorflow\]'"):
        export.saved_model(tmp_path / "model", classifier, images(2), kwargs={"train": False})
    assert os.listdir(tmp_path) == []


def test_saved_model_replaces_nothing(classifier, tmp_path):
    with pytest.raises(FileExistsError, match="nothing is replaced"):
        export.saved_model(tmp_path, classifier, images(2))


WRITER = """
    import sys
    import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
    from trainkit import export

    class Model(nn.Module):
        @nn.compact
        def __call__(self, batch, temperature, train=True):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(batch["image"])))
            x = x.reshape((x.shape[0], -1)) + nn.Embed(7, 512)(batch["label"])
            return {"logits": nn.Dense(10)(x) / temperature, "norms": [jnp.linalg.norm(x, axis=-1)]}

    def inputs(rows):
        generator = np.random.default_rng(rows)
        image = generator.normal(size=(rows, 8, 8, 1)).astype(np.float32)
        return {"image": image, "label": generator.integers(0, 7, rows).astype(np.int32)}, np.float32(0.7)

    variables = Model().init(jax.random.key(0), *inputs(2))
    export.saved_model(sys.argv[1], (Model(), variables), inputs(2), kwargs={"train": False})
    model = jax.jit(lambda *given: Model().apply(variables, *given, train=False))
    found = {}
    for rows in (1, 3, 8):
        batch, temperature = inputs(rows)
        outputs = model(batch, temperature)
        found |= {f"{rows}|image": batch["image"], f"{rows}|label": batch["label"], f"{rows}|t": temperature}
        found |= {f"{rows}|logits": outputs["logits"], f"{rows}|norms": outputs["norms"][0]}
    np.savez(sys.argv[2], **found)
"""

READER = """
    import importlib.util, sys
    for absent in ("jax", "jaxlib", "flax", "trainkit"):
        assert importlib.util.find_spec(absent) is None, absent
    import numpy as np, tensorflow as tf
    model, given, largest = tf.saved_model.load(sys.argv[1]), np.load(sys.argv[2]), 0.0
    for rows in (1, 3, 8):
        batch = {"image": given[f"{rows}|image"], "label": given[f"{rows}|label"]}
        outputs = model(batch, given[f"{rows}|t"])
        served = model.signatures["serving_default"](
            **{"input_0_image": tf.constant(batch["image"]), "input_0_label": tf.constant(batch["label"])},
            input_1=tf.constant(given[f"{rows}|t"]),
        )
        found = [("logits", outputs["logits"]), ("norms", outputs["norms"][0])]
        for name, value in [*found, ("logits", served["logits"]), ("norms", served["norms_0"])]:
            wanted = given[f"{rows}|{name}"]
            assert value.shape == wanted.shape and value.dtype == wanted.dtype
            largest = max(largest, float(np.abs(value.numpy() - wanted).max()))
    print("largest difference", largest)
"""


def install(folder, *requirements):
    """Makes a virtual environment with `requirements` and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    subprocess.run(command, check=True, timeout=1500)
    return python


@pytest.fixture
def environments(tmp_path):
    """A folder for virtual environments, 4 GB, that does not outlive the test."""
    folder = tmp_path / "environments"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_saved_model_runs_where_jax_is_not_installed(tmp_path, environments):
    pinned = [
        f"{name}=={importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "flax", "optax", "clu", "orbax-checkpoint", "tensorboardX", "rich")
    ]
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    writer = sys.executable if has_tensorflow else install(environments / "writer", "tensorflow-cpu", *pinned)
    reader = install(environments / "reader", "tensorflow-cpu")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    run(WRITER, tmp_path / "model", tmp_path / "given.npz", env=quiet, python=writer, cwd=tmp_path)
    nowhere = {**quiet, "PYTHONPATH": ""}
    printed = run(
        READER, tmp_path / "model", tmp_path / "given.npz", env=nowhere, python=reader, cwd=tmp_path
    )
    # Another version of XLA inside TensorFlow may fuse otherwise; float32 rounding of sums of 512 terms.
    assert float(printed.split()[-1]) < 1e-5, printed
    assert {path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")} == set()
