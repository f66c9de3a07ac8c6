"""Folders with odd names, with links in them, or with another run: nothing outside is touched, nothing is mixed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import trainkit as tk
from tests.faults.kill import ROOT
from tests.faults.small import Raises, arrays, check_whole, fit, make, steps
from tests.helpers.processes import on_a_disk
from tests.helpers.runs import flip, largest_file
from tests.helpers.weight import numbers, trainer, weight
from trainkit.checkpoint._manifest import read_json
from trainkit.checkpoint._store import Store
from trainkit.writers import read_jsonl

ODD = ("lr=[0.1]", "a{b,c}", "what?", "all*", "**", r"back\slash", "a b", "~", "$HOME", "new\nline", "ü", "[")


def break_off(logdir):
    """Leaves the run that died after step 9: checkpoints of the steps 4, 6 and 8."""
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(logdir, Raises("on_step", 9)))
    return logdir


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    return break_off(tmp_path_factory.mktemp("broken-off"))


@pytest.fixture
def logdir(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "logs")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path):
    """A folder that is none of the run's business; it must stay as it is."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"theirs")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


# Names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_a_run_goes_on_in_a_folder_of_any_name(tmp_path, name):
    logdir = break_off(tmp_path / "runs" / name)
    assert steps(logdir) == [4, 6, 8]
    check_whole(logdir, fit(make(logdir)))
    restored = make(None)
    restored.restore(logdir, step=10)
    assert weight(restored.state) == -sum(range(1, 11))


def test_a_run_goes_on_after_its_folder_got_an_odd_name(logdir, tmp_path):
    moved = logdir.rename(tmp_path / r"lr=[0.1]*\x")
    check_whole(moved, fit(make(moved)))


def test_a_checkpoint_without_what_it_is_read_by_is_not_complete(logdir):
    for name in ("state/manifest.ocdbt", "state/_METADATA", "host.json", "meta.json"):
        for listed in (True, False):
            copy = shutil.copytree(logdir, logdir.with_name("copy"))
            folder = copy / "checkpoints" / "8"
            (folder / name).unlink()
            if not listed:
                manifest = folder / "trainkit_manifest.json"
                entries = read_json(folder, manifest.name)
                del entries[name]
                manifest.write_text(json.dumps(entries))
            assert steps(copy) == [4, 6]
            shutil.rmtree(copy)


# Links --------------------------------------------------------------------------------------------------------


def test_the_lock_is_no_way_out(logdir, outside):
    lock = logdir / ".trainkit.lock"
    lock.unlink()
    lock.symlink_to(outside / "deep" / "file")
    with pytest.raises(OSError, match=r"\.trainkit\.lock.*symbolic link.*move it away"):
        fit(make(logdir))
    lock.unlink()
    os.link(outside / "deep" / "file", lock)
    check_whole(logdir, fit(make(logdir)))


@pytest.mark.parametrize("target", ["deep/file", "deep", "absent"])
@pytest.mark.parametrize("name", ["checkpoints/8.damaged", "checkpoints/4.removed", "checkpoints/9"])
def test_links_among_the_checkpoints_are_not_followed(logdir, outside, name, target):
    (logdir / name).symlink_to(outside / target)
    flip(largest_file(logdir / "checkpoints" / "8"))  # so that it is set aside
    check_whole(logdir, fit(make(logdir)))


def test_a_checkpoint_that_is_a_link_is_damaged(logdir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (logdir / "checkpoints" / "8").rename(elsewhere)
    before = contents(elsewhere)
    (logdir / "checkpoints" / "8").symlink_to(elsewhere)
    assert steps(logdir) == [4, 6]
    check_whole(logdir, fit(make(logdir)))
    assert contents(elsewhere) == before


def test_scores_are_not_written_through_a_link(logdir, outside):
    scores = logdir / "checkpoints" / "8" / "scores.json"
    scores.symlink_to(outside / "deep" / "file")
    store = Store(logdir / "checkpoints")
    with pytest.raises(OSError, match=r"scores\.json.*symbolic link"):
        store.add_scores(8, {"eval/loss": 1.0})
    assert store.scores()[8] == {}


def test_a_backup_made_of_hard_links_stays_as_it_was(logdir, tmp_path):
    backup = tmp_path / "backup"
    shutil.copytree(logdir, backup, copy_function=os.link)
    before = contents(backup)
    check_whole(logdir, fit(make(logdir)))
    assert contents(backup) == before
    check_whole(backup, fit(make(backup)))


def test_the_folder_and_its_checkpoints_may_be_links(tmp_path):
    (tmp_path / "disk" / "checkpoints").mkdir(parents=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    (tmp_path / "logs").symlink_to(tmp_path / "real")
    logdir = break_off(tmp_path / "logs")
    check_whole(logdir, fit(make(logdir)))
    assert len(list((tmp_path / "disk" / "checkpoints").iterdir())) == 3


# Other runs ---------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_with_three_ways_out(tmp_path):
    trainer(logdir=tmp_path).fit(numbers(1, 2), epochs=1)
    before = contents(tmp_path)
    ways = r"holds a run already \(logs\).*another logdir.*resume=True.*overwrite=True"
    with pytest.raises(ValueError, match=ways):
        trainer(logdir=tmp_path).fit(numbers(3, 4), epochs=1)
    assert contents(tmp_path) == before


def test_checkpoints_alone_are_a_run(logdir):
    for path in logdir.iterdir():
        if path.name != "checkpoints":
            path.unlink()
    with pytest.raises(ValueError, match=r"holds a run already \(checkpoints up to step 8\)"):
        trainer(logdir=logdir).fit(numbers(1), epochs=1)


def test_a_further_fit_of_the_trainer_and_a_resumed_one_go_on(tmp_path):
    made = trainer(logdir=tmp_path)
    made.fit(numbers(1, 2), epochs=1)
    made.fit(numbers(3, 4), epochs=1)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "scalars" in row] == [2, 4]


def test_a_trainer_restored_from_the_folder_goes_on_there(logdir):
    shutil.rmtree(logdir / "checkpoints" / "8")
    made = make(logdir)
    made.restore(logdir, step=6)
    result = made.fit(tk.data.Arrays(arrays(), 4), steps=6, eval_data=numbers(7))
    assert (result.step, weight(result.state)) == (12, -sum(range(1, 13)))
    logged = [
        row["step"] for row in read_jsonl(logdir / "metrics.jsonl") if "train/loss" in row.get("scalars", {})
    ]
    assert logged == sorted(set(logged))


FOREIGN = ("notes.txt", "checkpoints/notes.txt", "checkpoints/8/notes.txt", "checkpoints/8/state/notes.txt",
           "checkpoints/2024/plan.txt", "failures/notes.txt", "failures/7/notes.txt", "events.out.tfevents.1.theirs",
           "mine/metrics.jsonl")  # fmt: skip


def test_overwrite_removes_what_trainkit_wrote_and_nothing_else(logdir, outside):
    (logdir / "failures" / "7").mkdir(parents=True)
    (logdir / "failures" / "7" / "failure.json").write_text("{}")
    (logdir / "checkpoints" / "6.damaged").symlink_to(outside)
    for name in FOREIGN:
        (logdir / name).parent.mkdir(parents=True, exist_ok=True)
        (logdir / name).write_text("theirs")
    fresh = logdir.with_name("fresh")
    trainer(logdir=fresh).fit(numbers(1, 2), epochs=1)
    trainer(logdir=logdir, overwrite=True).fit(numbers(1, 2), epochs=1)
    left = set(contents(logdir))
    ours = {name for name in left if "tfevents" in name and name.endswith(".trainkit")}
    assert len(ours) == 1
    assert left - ours == {*FOREIGN, ".trainkit.lock", "metrics.jsonl"}
    rows, expected = (read_jsonl(folder / "metrics.jsonl") for folder in (logdir, fresh))
    assert [row.get("scalars") for row in rows] == [row.get("scalars") for row in expected]


def test_overwrite_does_so_once(tmp_path):
    made = trainer(logdir=tmp_path, overwrite=True)
    made.fit(numbers(1, 2), epochs=1)
    made.fit(numbers(3, 4), epochs=1)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "scalars" in row] == [2, 4]


def test_overwrite_leaves_the_old_run_where_the_new_one_could_not_begin(logdir):
    before = contents(logdir)
    with pytest.raises(ValueError, match="empty"):
        trainer(logdir=logdir, overwrite=True).fit([], epochs=1)
    assert contents(logdir) == before


def test_overwrite_and_resume_contradict_each_other(logdir):
    before = contents(logdir)
    with pytest.raises(ValueError, match=r"resume=True and Trainer\(overwrite=True\)"):
        fit(make(logdir, overwrite=True))
    assert contents(logdir) == before


def test_a_live_run_is_not_overwritten(tmp_path):
    def second(info):
        with pytest.raises(ValueError, match="being written to by another run"):
            trainer(logdir=tmp_path, overwrite=True).fit(numbers(1), epochs=1)

    trainer(tk.callbacks.Lambda(on_step=second), logdir=tmp_path).fit(numbers(1, 2), epochs=1)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "scalars" in row] == [2]


# Children -----------------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore")
import trainkit as tk
from tests.helpers.runs import flip, largest_file
from tests.helpers.weight import numbers, trainer

def fork(info):
    if info.step == 1:
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        print("forked", flush=True)
        if sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)

made = trainer(tk.callbacks.Lambda(on_step=fork), tk.callbacks.Checkpoint(), logdir=sys.argv[1])
made.fit(numbers(1, 2), epochs=1)
trainer(logdir=sys.argv[1], overwrite=True).fit(numbers(1, 2), epochs=1)
print("again", flush=True)
"""


@pytest.mark.parametrize("end", ["die", "end"])
def test_a_forked_child_does_not_keep_the_folder(tmp_path, end):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, tmp_path, end],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "forked\n"
        if end == "end":
            assert process.stdout.readline() == "again\n"
        process.wait(timeout=60)
        # The child lives on.
        trainer(logdir=tmp_path, overwrite=True).fit(numbers(1, 2), epochs=1)
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()


# A save that can't begin --------------------------------------------------------------------------------------

BLOCKED = """
import pathlib, shutil, sys
from tests.faults.small import fit, make
import trainkit as tk

def block(info):
    if info.step == 5:
        folder = pathlib.Path(sys.argv[1]) / "checkpoints"
        while not (folder / "4").exists():
            pass
        shutil.rmtree(folder)
        folder.write_text("a file")

try:
    fit(make(sys.argv[1], tk.callbacks.Lambda(on_step=block)))
except OSError as error:
    print(error)
"""


def test_a_save_that_cannot_begin_ends_the_process(tmp_path):
    # Orbax's threads would wait for five minutes.
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "the checkpoint of step 6 could not be saved" in done.stdout, done.stderr


def test_a_disk_without_inodes(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [
        *on_a_disk(disk, "size=4m,nr_inodes=30"),
        sys.executable,
        "-m",
        "tests.faults.test_folders",
        disk,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not be saved" in done.stdout


if __name__ == "__main__":
    try:
        fit(make(pathlib.Path(sys.argv[1]) / "run"))
    except OSError as error:
        print(error)
