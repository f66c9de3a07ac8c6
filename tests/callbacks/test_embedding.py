"""`Embedding`: TensorBoard's projector opens what a run wrote, of each step once, and finds what was given."""

import io
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import trainkit as tk
from tests.helpers.infos import make_info
from tests.helpers.runs import dies_at
from tests.helpers.tensorboard_pages import Pages
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Checkpoint, Embedding
from trainkit.writers import _projector
from trainkit.writers._projector import write_embedding

VECTORS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
EACH = tk.Every(steps=1)
TWO = numbers(1, 2)


class Projector:
    """What the projector's page is given of a folder of runs."""

    def __init__(self, logdir):
        self._pages = Pages(logdir)

    def runs(self):
        return json.loads(self._pages.get("projector/runs"))

    def embeddings(self, run="."):
        """By name, the shape in the list and what the page loads of it."""
        listed = json.loads(self._pages.get("projector/info", run=run))["embeddings"]
        return {one["tensorName"]: one for one in listed}

    def tensor(self, name, width, run="."):
        return np.frombuffer(self._pages.get("projector/tensor", run=run, name=name), np.float32).reshape(
            -1, width
        )

    def metadata(self, name, run="."):
        return self._pages.get("projector/metadata", run=run, name=name).decode().splitlines()

    def sprite(self, name, run="."):
        return np.asarray(
            Image.open(io.BytesIO(self._pages.get("projector/sprite_image", run=run, name=name)))
        )


def test_the_projector_finds_vectors_labels_and_images(tmp_path):
    images = np.zeros((5, 2, 3, 1), np.float32)
    images[np.arange(5), 0, 0] = np.arange(5)[:, None] / 4

    def fn(info):
        return jnp.asarray(VECTORS) * info.step, ["a", "b\tc", "", "dé", 7], images

    trainer(Embedding(fn, every=EACH, name="my digits"), logdir=tmp_path / "run").fit(TWO, epochs=1)
    page = Projector(tmp_path)
    assert page.runs() == ["run"]
    assert list(page.embeddings("run")) == ["my digits:00001", "my digits:00002"]
    assert page.embeddings("run")["my digits:00001"]["tensorShape"] == [5, 3]
    for step in (1, 2):
        name = f"my digits:{step:05d}"
        np.testing.assert_array_equal(page.tensor(name, 3, "run"), VECTORS * np.float32(step))
        assert page.metadata(name, "run") == ["a", "b c", "-", "dé", "7"]
        sprite = page.sprite(name, "run")
        assert page.embeddings("run")[name]["sprite"]["singleImageDim"] == [3, 3]
        # Three by three pictures of three by three pixels, the given ones in the first rows of each.
        assert sprite.shape == (9, 9, 3)
        np.testing.assert_array_equal(sprite[0:9:3, 0:9:3, 0].reshape(-1)[:5], [0, 64, 128, 191, 255])
        assert (sprite[6:, 6:] == 255).all()


def test_several_columns_have_a_head_and_labels_may_be_missing(tmp_path):
    columns = {"digit": np.arange(5), "split": jnp.arange(5) % 2}

    def fn(info):
        return {"with": (VECTORS, columns), "without": (VECTORS, None)}

    trainer(Embedding(fn), logdir=tmp_path).fit(TWO, epochs=1)
    page = Projector(tmp_path)
    assert page.metadata("with:00002") == ["digit\tsplit", "0\t0", "1\t1", "2\t0", "3\t1", "4\t0"]
    assert "metadataPath" not in page.embeddings()["without:00002"]


def test_a_resumed_run_has_each_step_once(tmp_path):
    def fit(*callbacks, scale):
        shown = Embedding(lambda info: (VECTORS * scale, None), every=EACH)
        saves = Checkpoint(every=tk.Every(steps=2))
        made = trainer(shown, saves, *callbacks, logdir=tmp_path)
        return made.fit(numbers(1, 2, 3, 4), epochs=1, resume=True)

    with pytest.raises(ConnectionError):
        fit(dies_at(3), scale=1)
    assert len(Projector(tmp_path).embeddings()) == 3

    def looks(info):
        seen.append(list(Projector(tmp_path).embeddings()))

    seen = []
    fit(tk.callbacks.Lambda(on_fit_start=looks), scale=2)
    page = Projector(tmp_path)
    assert seen == [["embedding:00001", "embedding:00002"]]
    assert list(page.embeddings()) == [f"embedding:{step:05d}" for step in (1, 2, 3, 4)]
    np.testing.assert_array_equal(page.tensor("embedding:00002", 3), VECTORS)
    np.testing.assert_array_equal(page.tensor("embedding:00003", 3), VECTORS * 2)


def test_what_others_wrote_stays_also_where_the_run_is_overwritten(tmp_path):
    mine = 'embeddings { tensor_name: "mine" tensor_path: "mine.tsv" }\n'
    (tmp_path / "projector_config.pbtxt").write_text(mine)
    (tmp_path / "mine.tsv").write_text("1\t2\n")
    shown = Embedding(lambda info: (VECTORS, None), every=EACH)
    trainer(shown, logdir=tmp_path).fit(TWO, epochs=1)
    page = Projector(tmp_path)
    assert list(page.embeddings()) == ["mine", "embedding:00001", "embedding:00002"]
    np.testing.assert_array_equal(page.tensor("mine", 2), [[1, 2]])
    (tmp_path / "projector" / "notes.txt").write_text("mine, too")
    trainer(logdir=tmp_path, overwrite=True).fit(TWO, epochs=1)
    assert (tmp_path / "projector_config.pbtxt").read_text() == mine
    assert [path.name for path in (tmp_path / "projector").iterdir()] == ["notes.txt"]


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    outside, logdir = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    logdir.mkdir()
    write_embedding(outside, "embedding", 9, VECTORS, {})
    (logdir / "projector").symlink_to(outside / "projector")
    with pytest.raises(NotADirectoryError, match="is no folder of its own but a link"):
        trainer(Embedding(lambda info: (VECTORS, None)), logdir=logdir).fit(TWO, epochs=1)
    trainer(logdir=logdir, overwrite=True).fit(TWO, epochs=1)
    assert (outside / "projector" / "embedding" / "00009" / "tensors.tsv").exists()


@pytest.mark.parametrize("name", ["../up", "..", "a/b", 'a"b\\c', "ä b"])
def test_any_name_is_one_folder_below_the_logs(tmp_path, name):
    write_embedding(tmp_path, name, 3, VECTORS, {"": list("abcde")})
    assert {path.name for path in tmp_path.iterdir()} == {"projector", "projector_config.pbtxt"}
    assert len(list((tmp_path / "projector").iterdir())) == 1
    page = Projector(tmp_path)
    assert list(page.embeddings()) == [f"{name}:00003"]
    np.testing.assert_array_equal(page.tensor(f"{name}:00003", 3), VECTORS)


def test_a_sprite_is_never_larger_than_a_browser_takes(tmp_path, monkeypatch):
    assert _projector._LARGEST_SPRITE == 8192
    monkeypatch.setattr(_projector, "_LARGEST_SPRITE", 99)
    write_embedding(tmp_path, "e", 1, np.ones((17, 2), np.float32), {}, np.zeros((17, 40, 20, 3), np.uint8))
    page = Projector(tmp_path)
    assert page.embeddings()["e:00001"]["sprite"]["singleImageDim"] == [19, 19]
    assert page.sprite("e:00001").shape == (95, 95, 3)


def test_without_a_logdir_nothing_is_called_and_that_is_said_once(caplog):
    called = []
    made = trainer(Embedding(called.append, every=EACH))
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        made.fit(TWO, epochs=1)
        made.fit(TWO, epochs=1)
    assert not called
    assert [r.getMessage() for r in caplog.records] == [
        "Embedding writes nothing: it needs a folder, Trainer(logdir=...)."
    ]


def test_what_is_not_finite_is_said_and_shown_as_0(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        trainer(Embedding(lambda info: ([[1, np.nan], [np.inf, 2]], None)), logdir=tmp_path).fit(
            TWO, epochs=1
        )
    assert "not all finite" in caplog.text
    np.testing.assert_array_equal(Projector(tmp_path).tensor("embedding:00002", 2), [[1, 0], [0, 2]])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, r"'embedding' is a NoneType; fn returns \(vectors, labels\)"),
        (VECTORS, TypeError, "is a ndarray; fn returns"),
        ((VECTORS,), TypeError, "is a tuple of 1"),
        ((VECTORS[0], None), ValueError, r"have the shape \[3\] and dtype float32; fn returns"),
        ((VECTORS[:0], None), ValueError, r"shape \[0, 3\]"),
        ((VECTORS, ["a"]), ValueError, "has 5 vectors and 1 labels; give one for each"),
        ((VECTORS, {"x": range(5), "y": "abcd"}), TypeError, "labels of 'embedding' are a str"),
        ((VECTORS, {"x": range(5), "y": range(4)}), ValueError, "5 vectors and 4 y"),
        ((VECTORS, None, np.zeros((4, 2, 2, 1))), ValueError, "5 vectors and 4 images"),
        ((VECTORS, None, np.zeros((5, 2, 2))), ValueError, r"shape \[5, 2, 2\]"),
        (
            (VECTORS, None, np.zeros((2, 2, 3))),
            ValueError,
            r"images of 'embedding' have the shape \[2, 2, 3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, returned, error, message):
    with pytest.raises(error, match=message):
        trainer(Embedding(lambda info: returned), logdir=tmp_path).fit(TWO, epochs=1)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"Embedding\('f'\): expected a function"):
        Embedding("f")
    assert Embedding(lambda info: (VECTORS, None)).on_step(make_info(1)) is None  # no folder
