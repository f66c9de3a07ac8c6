"""The folder of checkpoints: what is written, what is removed, and what is left alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_same
from tests.helpers.runs import flip, largest_file
from trainkit._core.tree import flat, nested
from trainkit.checkpoint._retention import Best, Retention
from trainkit.checkpoint._store import Contents, Store

LOSS = Best("eval/loss", "min")


def contents(number, *, loss=None, extra=None):
    scores = {} if loss is None else {"eval/loss": loss}
    return Contents(
        {"params/w": jnp.full(3, number, jnp.float32)}, extra or {}, {"scores": scores}, {"number": number}
    )


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "checkpoints")
    yield made
    made.close()


def save(store, *steps, losses=()):
    for step, loss in zip(steps, losses or [None] * len(steps), strict=True):
        store.save(step, contents(step, loss=loss))
    store.wait()


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_there_and_back(store):
    arrays = {
        "params/a/kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "params/a/count": jnp.int32(7),
        "rng": jax.random.key(3, impl="rbg"),
        "flags": jnp.array([True, False]),
    }
    extra = {"0": jnp.arange(4.0), "1": np.arange(3, dtype=np.int8)}
    store.save(5, Contents(arrays, extra, {"scores": {}, "text": "\u00fc"}, {"values": [1, None]}))
    store.wait()
    assert store.steps() == [5]
    assert store.meta(5) == {"scores": {}, "text": "\u00fc"}
    host, loaded = store.load_host(5)
    assert host == {"values": [1, None]}
    assert_same(loaded, jax.device_get(extra))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in arrays.items()
    }
    back = store.load_state(5, target)
    assert back.keys() == arrays.keys()
    assert_same(back, arrays)
    # A part is enough; without a sharding it comes to the host.
    (kernel,) = store.load_state(5, {"params/a/kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}).values()
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, np.asarray(arrays["params/a/kernel"]))


def test_what_is_saved_does_not_change_with_the_arrays_afterwards(store):
    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, host = jnp.zeros(1 << 16), np.zeros(1 << 16)
    store.save(1, Contents({"w": array}, {"0": host}, {"scores": {}}, {}))
    donate(array).block_until_ready()
    store.wait()
    target = {"w": jax.ShapeDtypeStruct((1 << 16,), jnp.float32)}
    np.testing.assert_array_equal(store.load_state(1, target)["w"], np.zeros(1 << 16))


def test_an_empty_or_missing_folder_has_no_checkpoints(store):
    assert store.steps() == []
    assert store.scores() == {}
    store.folder.mkdir()
    assert store.steps() == []


def test_retention_removes_whole_folders(store):
    save(store, 1, 2, 3, 4, losses=[4.0, 1.0, 3.0, 2.0])
    store.retain(Retention(1, LOSS))
    store.close()
    assert names(store) == ["2", "4"]
    assert store.best(LOSS) == 2
    assert store.problems(2) == store.problems(4) == []


def test_scores_that_come_later_count(store):
    save(store, 1, 2, 3, losses=[4.0, None, 3.0])
    store.retain(Retention(3, LOSS))  # has read them once
    store.add_scores(2, {"eval/loss": 0.5})
    assert store.meta(2)["scores"] == {"eval/loss": 0.5}
    store.retain(Retention(1, LOSS))
    store.close()
    assert names(store) == ["2", "3"]
    assert store.problems(2) == []  # the list of files is still right
    assert Store(store.folder).best(LOSS) == 2


def test_scores_of_a_checkpoint_that_is_gone_are_dropped(store):
    save(store, 2)
    store.add_scores(1, {"eval/loss": 0.5})
    assert names(store) == ["2"]


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(store, tmp_path):
    save(store, 3)
    foreign = [
        "notes",
        "2024",
        "7.txt",
        "old.removed",
        "mine.orbax-checkpoint-tmp",
        "007",
        "\u0663",
        "3.damaged",
    ]
    ours = ["5.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-12", "1.removed"]
    for name in [*foreign, *ours]:
        (store.folder / name).mkdir()
        (store.folder / name / "file").write_text("content")
    (store.folder / "9").write_text("a file, no folder")
    (tmp_path / "beside").mkdir()
    store.clean()
    assert store.steps() == [3]
    save(store, 10, 11, 12)
    store.retain(Retention(1, LOSS))
    store.close()
    assert names(store) == sorted([*foreign, "9", "12"])
    assert all((store.folder / name / "file").read_text() == "content" for name in foreign)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "checkpoints"]


def test_a_link_is_removed_and_what_it_points_to_is_not(store, tmp_path):
    save(store, 1)
    (store.folder / "1").rename(tmp_path / "archive")
    (store.folder / "1").symlink_to(tmp_path / "archive")
    save(store, 2)
    store.retain(Retention(1, None))
    store.close()
    assert store.steps() == [2]
    assert Store(tmp_path).folder.joinpath("archive", "meta.json").exists()


def test_a_damaged_one_is_set_aside_and_its_step_saved_again(store):
    save(store, 1, 2)
    for _ in range(2):  # also where one was set aside before
        flip(largest_file(store.folder / "2"))
        assert len(store.problems(2)) == 1
        store.set_aside(2)
        assert names(store) == ["1", "2.damaged"]
        save(store, 2)
        assert store.problems(2) == []
    assert names(store) == ["1", "2", "2.damaged"]


@pytest.mark.parametrize("name", ["meta.json", "host.json", "trainkit_manifest.json"])
def test_without_any_one_of_its_files_a_checkpoint_still_counts_as_a_damaged_one(store, name):
    save(store, 1)
    (store.folder / "1" / name).unlink()
    assert store.steps() == [1]
    assert [line.split(":")[0] for line in store.problems(1)] == [name]
    assert store.scores() == {1: {}}


def test_a_save_that_cannot_be_written_names_the_newest_whole_one(store):
    save(store, 1)
    wrong = Contents({"a": jnp.ones(2), "b": object()}, {}, {"scores": {}}, {})
    message = r"step 2 could not be saved .*newest complete one is of step 1.*resume=True"
    with pytest.raises(OSError, match=message):
        store.save(2, wrong)
    assert store.steps() == [1]
    save(store, 3)  # and goes on
    assert store.steps() == [1, 3]


def test_names_and_trees():
    arrays = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert nested(arrays) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flat(nested(arrays)) == arrays
    for wrong in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(ValueError, match="is an array and a branch; rename one"):
            nested(wrong)


def test_the_documents_are_json(store):
    save(store, 4)
    assert json.loads((store.folder / "4" / "meta.json").read_text()) == {"scores": {}}
