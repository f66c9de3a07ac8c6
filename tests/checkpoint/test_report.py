"""`tk.checkpoint.list` and `verify`: what there is, for people."""

import datetime

import pytest

import trainkit as tk
from tests.helpers.runs import TEN, Script, flip, largest_file, saving
from tests.helpers.weight import trainer


@pytest.fixture
def logdir(tmp_path):
    script = Script({4: 2.0, 8: 3.0})
    made = saving(tmp_path, script, every=tk.Every(steps=4), best=("eval/loss", "min"), metadata={"run": 7})
    made.fit(TEN, epochs=1, eval_data=script.data, eval_every=tk.Every(steps=4))
    return tmp_path


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_list(logdir, where):
    found = tk.checkpoint.list(str(logdir / where))
    assert [(info.step, info.scores) for info in found] == [
        (4, {"eval/loss": 2.0}),
        (8, {"eval/loss": 3.0}),
        (10, {}),
    ]
    for info in found:
        assert info.path == logdir / "checkpoints" / str(info.step)
        assert info.metadata == {"run": 7}
        assert info.problems == ()
        assert info.bytes == sum(file.stat().st_size for file in info.path.rglob("*") if file.is_file())
        assert info.time.tzinfo is not None
        assert abs(datetime.datetime.now(datetime.UTC) - info.time) < datetime.timedelta(hours=1)
    assert [info.time for info in found] == sorted(info.time for info in found)
    assert tk.checkpoint.verify(logdir / where) == found


def test_verify_names_what_is_wrong_and_list_does_not_look(logdir):
    large = largest_file(logdir / "checkpoints" / "4")
    flip(large)
    (logdir / "checkpoints" / "8" / "host.json").unlink()
    name = str(large.relative_to(logdir / "checkpoints" / "4"))
    assert [info.problems for info in tk.checkpoint.verify(logdir)] == [
        (f"{name}: its content was changed (the checksum differs)",),
        ("host.json: is missing",),
        (),
    ]
    assert all(info.problems == () for info in tk.checkpoint.list(logdir))


def test_one_whose_description_cannot_be_read_is_listed_all_the_same(logdir):
    (logdir / "checkpoints" / "8" / "meta.json").write_text("{")
    info = tk.checkpoint.list(logdir)[1]
    assert (info.step, info.scores, info.metadata) == (8, {}, {})
    assert info.problems[0].startswith("meta")
    assert len(tk.checkpoint.verify(logdir)[1].problems) == 1


def test_without_a_folder_and_without_checkpoints(tmp_path):
    for look in (tk.checkpoint.list, tk.checkpoint.verify):
        with pytest.raises(
            FileNotFoundError, match=r"there is no folder .*absent'; give the logdir of a run"
        ):
            look(tmp_path / "absent")
        assert look(tmp_path) == []


def test_what_is_listed_can_be_restored(logdir):
    for info in tk.checkpoint.list(logdir):
        assert trainer().restore(info.path).step == info.step
