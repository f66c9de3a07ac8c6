"""Files of the newest checkpoint cut short, changed or gone: said so, and the run goes on from the one before."""

import json
import logging
import shutil

import pytest

import trainkit as tk
from tests.faults.small import Raises, check_whole, fit, make, steps
from trainkit.checkpoint._manifest import write_manifest


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def remove(path):
    path.unlink()


DAMAGES = (truncate, flip, remove)
# Orbax writes into these when it was done, last of all; no number of a run depends on them.
UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """The folder of a run that died after step 9: it has the checkpoints of the steps 4, 6 and 8."""
    logdir = tmp_path_factory.mktemp("broken-off")
    with pytest.raises(RuntimeError, match="broken in on_step"):
        fit(make(logdir, Raises("on_step", 9)))
    assert steps(logdir) == [4, 6, 8]
    return logdir


@pytest.fixture
def logdir(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "logs")


def files(logdir, step=8):
    folder = logdir / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_every_file(logdir):
    """Damages one file after the other in every way, and puts it back; yields the file and the damage."""
    for path in files(logdir):
        whole = path.read_bytes()
        for damage in DAMAGES:
            damage(path)
            yield path, damage
            path.write_bytes(whole)


def test_every_damage_is_found_and_named(logdir):
    assert len(files(logdir)) > 10
    for path, damage in damage_every_file(logdir):
        found = tk.checkpoint.verify(logdir)
        assert [info.step for info in found] == [4, 6, 8]
        assert not found[0].problems
        assert not found[1].problems
        # A changed list of the files is told as a file that is missing or not as listed.
        named = "" if path.name == "trainkit_manifest.json" else path.name
        told = any(named in problem for problem in found[2].problems)
        assert told or path.name in UNLISTED, (path, damage, found[2].problems)


def goes_on_from(logdir, caplog, step):
    """Resumes in `logdir` from `step`, with a word on every damaged checkpoint, to the end of a whole run."""
    begun = []
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        result = fit(make(logdir, tk.callbacks.Lambda(on_fit_start=lambda info: begun.append(info.step))))
    check_whole(logdir, result)
    assert begun == [step]
    return caplog.text


def fall_back(broken_off, tmp_path, caplog, cases):
    for number, (name, damage) in enumerate(cases):
        logdir = shutil.copytree(broken_off, tmp_path / str(number))
        damage(logdir / "checkpoints" / "8" / name)
        if not tk.checkpoint.verify(logdir)[-1].problems:
            assert name.name in UNLISTED
            goes_on_from(logdir, caplog, 8)
            continue
        told = goes_on_from(logdir, caplog, 6)
        assert "checkpoint of step 8 is damaged" in told, (name, damage)
        assert "the newest whole checkpoint is that of step 6" in told
        assert steps(logdir) == [8, 10, 12]
        assert (logdir / "checkpoints" / "8.damaged").is_dir()


def names(broken_off):
    return [path.relative_to(broken_off / "checkpoints" / "8") for path in files(broken_off)]


def test_a_run_falls_back_to_the_newest_whole_checkpoint(broken_off, tmp_path, caplog):
    cases = [(name, DAMAGES[index % 3]) for index, name in enumerate(names(broken_off)[::3])]
    fall_back(broken_off, tmp_path, caplog, cases)


@pytest.mark.slow
def test_a_run_falls_back_whatever_the_damage(broken_off, tmp_path, caplog):
    cases = [(name, damage) for name in names(broken_off) for damage in DAMAGES]
    fall_back(broken_off, tmp_path, caplog, cases)


def test_two_damaged_checkpoints_are_passed_over(logdir, caplog):
    truncate(files(logdir, 8)[-1])
    flip(next(path for path in files(logdir, 6) if path.parent.name == "d"))
    told = goes_on_from(logdir, caplog, 4)
    assert "step 8 is damaged" in told
    assert "step 6 is damaged" in told


def test_a_checkpoint_of_which_little_is_left_is_in_nobodys_way(logdir, caplog):
    shutil.rmtree(logdir / "checkpoints" / "8")
    (logdir / "checkpoints" / "8").mkdir()
    (logdir / "checkpoints" / "8" / "note").write_text("mine")
    goes_on_from(logdir, caplog, 6)
    assert steps(logdir) == [8, 10, 12]
    assert (logdir / "checkpoints" / "8.damaged" / "note").read_text() == "mine"


def test_where_all_are_damaged_the_run_is_refused_and_nothing_touched(logdir):
    for step in (4, 6, 8):
        flip(next(path for path in files(logdir, step) if path.parent.name == "d"))
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file() and path.name[0] != "."}
    with pytest.raises(
        ValueError, match=r"every checkpoint in .* is damaged \(step 8: .*; step 6: .*; step 4: "
    ):
        fit(make(logdir))
    after = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file() and path.name[0] != "."}
    assert after == before


def test_later_scores_that_cannot_be_read_cost_the_scores_only(logdir, caplog):
    (logdir / "checkpoints" / "8" / "scores.json").write_bytes(b'{"eval/loss": 1')
    goes_on_from(logdir, caplog, 8)


def test_restore_names_the_damage_and_takes_the_newest_whole_one(logdir, caplog):
    truncate(files(logdir)[-1])
    made = make(tmp := logdir.parent / "other")
    assert made.restore(logdir).step == 6
    assert "step 8 is damaged" in caplog.text
    with pytest.raises(ValueError, match=r"the checkpoint of step 8 in .* is damaged"):
        made.restore(logdir, step=8)
    # It only reads: the damaged one is where it was.
    assert (logdir / "checkpoints" / "8").is_dir()
    assert not tmp.exists()


def forge(logdir, name, change):
    """Changes a document of the newest checkpoint, and its list of files with it."""
    folder = logdir / "checkpoints" / "8"
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    write_manifest(folder)


FORGED = {
    "no arrays": ("meta.json", lambda meta: meta.pop("arrays")),
    "arrays of another form": ("meta.json", lambda meta: meta["arrays"].update(step=3)),
    "a negative size": ("meta.json", lambda meta: meta["arrays"].update(step=["int32", [-1]])),
    "no form": ("meta.json", lambda meta: meta.update(plain="yes")),
    "scores that are no numbers": ("meta.json", lambda meta: meta.update(scores={"eval/loss": "low"})),
    "no values": ("host.json", lambda host: host.pop("values")),
    "values of another type": ("host.json", lambda host: host["values"].update(epoch="one")),
    "values too few": ("host.json", lambda host: host["values"].pop("batch")),
    "values too many": ("host.json", lambda host: host["values"].update(more=1)),
    "arrays that are not there": ("host.json", lambda host: host.update(extra={"0": ["float32", [3]]})),
}


@pytest.mark.parametrize("how", FORGED)
def test_what_no_run_has_written_is_damage_even_where_its_checksum_is_right(logdir, how, caplog):
    forge(logdir, *FORGED[how])
    with caplog.at_level(logging.WARNING, "trainkit"):
        check_whole(logdir, fit(make(logdir)))
    assert any("the checkpoint of step 8 is damaged" in record.getMessage() for record in caplog.records)
