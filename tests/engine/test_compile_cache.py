"""Compiled programs kept in the user's cache, unless JAX was given a folder: whoever starts next reads them."""

import json
import os
import pathlib
import resource
import stat
import subprocess
import sys

import jax
import pytest

from tests.engine.starts import start
from tests.helpers.processes import on_a_disk
from trainkit._engine import compile_cache
from trainkit._engine.program_files import ProgramFiles

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = "jit__train"


@pytest.fixture
def cache(no_cache, monkeypatch):
    """The folder of the user's cache, in which all that is compiled is kept; not made yet."""
    monkeypatch.setattr(compile_cache, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compile_cache, "_told", set())
    return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "trainkit"


def kept(folder, of=""):
    """The files of programs, and their contents."""
    return {path.name: path.read_bytes() for path in folder.glob(f"{of}*.program")}


# Who finds what -----------------------------------------------------------------------------------------------


def test_another_run_and_a_resumed_one_compile_nothing(cache, tmp_path):
    before = jax.config.jax_persistent_cache_min_entry_size_bytes
    first = start(tmp_path / "first")
    assert first.missed[TRAIN] == 1
    assert not first.hit
    files = kept(cache)
    assert len(kept(cache, TRAIN)) == 1
    # Other programs of the process are the user's own affair.
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == before
    for logdir, steps in (("second", 2), ("first", 4), ("second", 6)):
        again = start(tmp_path / logdir, steps)
        assert again.hit[TRAIN] == 1
        assert not again.missed
    assert kept(cache) == files


def test_nothing_that_runs_is_in_the_folder_of_a_run(cache, tmp_path):
    start(tmp_path)
    assert kept(cache, TRAIN)
    programs = [*tmp_path.rglob("*.program"), *tmp_path.rglob("*-cache"), *tmp_path.rglob("trainkit-call*")]
    assert not programs
    assert not (tmp_path / "compiled").exists()


def begin(folder, logdir, steps, *before):
    """Starts a process that trains in `folder`, where the user's cache is as well."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(folder)}
    command = [*before, sys.executable, "-m", "tests.engine.starts", folder / logdir, str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)


def test_processes_that_start_together_and_one_that_resumes(tmp_path):
    def told(process):
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert "Warning" not in errors
        return json.loads(out)

    together = [begin(tmp_path, "a", 2), begin(tmp_path, "b", 2)]
    for process in together:
        missed, hit = told(process)
        assert missed.get(TRAIN, 0) + hit.get(TRAIN, 0) == 1
    after = [begin(tmp_path, "a", 4), begin(tmp_path, "c", 2)]
    for process in after:
        missed, hit = told(process)
        assert not missed
        assert hit[TRAIN] == 1
    assert not [path for path in (tmp_path / "trainkit").iterdir() if path.name.startswith(".")]


# Who says otherwise -------------------------------------------------------------------------------------------


def test_a_folder_that_jax_was_given_is_used_instead(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    start(tmp_path / "logs")
    assert not cache.exists()
    assert any("train" in path.name for path in (tmp_path / "given").glob("*-cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")


def test_a_trainer_and_jax_can_be_told_to_keep_nothing(cache, tmp_path):
    start(tmp_path / "a", keep_compiled=False)
    start(tmp_path / "b", dry_run=2)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        start(tmp_path / "c")
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not cache.exists()


# Where the folder is, and whose -------------------------------------------------------------------------------


def test_the_folder_is_the_user_s_alone(cache, tmp_path):
    before = os.umask(0o002)
    try:
        start(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.glob("*.program")} == {0o600}


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_without_a_folder_by_the_standard_it_is_below_the_home(cache, tmp_path, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    start(tmp_path / "logs")
    assert kept(tmp_path / ".cache" / "trainkit", TRAIN)


def a_link(cache):
    elsewhere = cache.with_name("elsewhere")
    elsewhere.mkdir()
    cache.symlink_to(elsewhere)
    return "is no folder of its own but a link or a file"


def a_file(cache):
    cache.write_text("")
    return "is no folder of its own but a link or a file"


def of_the_group(cache):
    cache.mkdir()
    cache.chmod(0o770)
    return "may be written to by others (chmod go-w it)"


def of_all(cache):
    cache.mkdir()
    cache.chmod(0o707)
    return "may be written to by others (chmod go-w it)"


def of_another(cache):
    if os.geteuid():
        pytest.skip("needs the right to give a folder away")
    cache.mkdir()
    os.chown(cache, 4242, 4242)
    return "belongs to another user"


@pytest.mark.parametrize("made", [a_link, a_file, of_the_group, of_all, of_another])
def test_a_folder_that_others_may_write_to_is_not_used_and_that_is_said_once(cache, tmp_path, caplog, made):
    reason = made(cache)
    for logdir in ("a", "b"):
        told = start(tmp_path / logdir)
        assert not told.missed  # no cache was set
    assert not [*cache.parent.rglob("*.program")]
    said = [record.getMessage() for record in caplog.records if "compiled programs" in record.getMessage()]
    assert said == [f"compiled programs are not kept: {cache} {reason}."]


def test_a_home_that_is_not_there_is_not_made(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    start(tmp_path / "logs")
    assert not (tmp_path / "gone").exists()
    assert "is the home of this user, and is not there" in caplog.text


# What can go wrong with a file --------------------------------------------------------------------------------


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-100], lambda content: b""])
def test_a_damaged_program_is_compiled_and_kept_again(cache, tmp_path, caplog, damage):
    start(tmp_path / "a")
    ((name, content),) = kept(cache, TRAIN).items()
    (cache / name).write_bytes(damage(content))
    again = start(tmp_path / "b")
    assert again.missed == {TRAIN: 1}
    assert f"{cache / name} is damaged: it is compiled again" in caplog.text
    assert start(tmp_path / "c").hit[TRAIN] == 1


def test_no_link_is_read_or_written_through(tmp_path):
    files, outside = ProgramFiles(tmp_path), tmp_path / "outside"
    files.put("key", b"program")
    (path,) = tmp_path.glob("*.program")
    path.rename(outside)
    path.symlink_to(outside)
    assert files.get("key") is None
    files.put("key", b"another")
    assert files.get("key") == b"another"
    assert not path.is_symlink()
    assert outside.read_bytes().endswith(b"program")


def test_a_file_that_others_may_have_written_is_not_read(tmp_path):
    files = ProgramFiles(tmp_path)
    files.put("key", b"program")
    (path,) = tmp_path.glob("*.program")
    assert files.get("key") == b"program"
    path.chmod(0o620)
    assert files.get("key") is None


def test_a_program_under_another_name_is_not_that_program(tmp_path):
    files = ProgramFiles(tmp_path)
    files.put("one", b"program")
    (path,) = tmp_path.glob("*.program")
    path.rename(path.with_name(path.name.replace("one", "two")))
    assert files.get("two") is None


def test_names_may_be_long(tmp_path):
    files = ProgramFiles(tmp_path)
    files.put("f" * 400 + "-1", b"one")
    files.put("f" * 400 + "-2", b"two")
    assert (files.get("f" * 400 + "-1"), files.get("f" * 400 + "-2")) == (b"one", b"two")


# Room ---------------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_makes_room(tmp_path):
    files = ProgramFiles(tmp_path, largest=900)
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla" / "tuned").write_bytes(bytes(300))
    os.utime(tmp_path / "xla" / "tuned", (1, 1))
    for age, key in enumerate("abc", start=2):
        files.put(key, bytes(200))
        (path,) = tmp_path.glob(f"{key}*.program")
        os.utime(path, (age, age))
    assert not (tmp_path / "xla" / "tuned").exists()
    assert files.get("a") == bytes(200)  # used just now
    files.put("d", bytes(300))
    assert [key for key in "abcd" if files.get(key)] == ["a", "c", "d"]
    files.put("e", bytes(2000))  # would push out all the others
    assert [key for key in "abcde" if files.get(key)] == ["a", "c", "d"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()) <= 900


def test_a_write_that_is_broken_off_leaves_nothing_and_is_said_once(tmp_path, caplog):
    files, (soft, hard) = ProgramFiles(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        files.put("a", bytes(5000))
        files.put("b", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert caplog.text.count("compiled programs are not kept in") == 1
    files.put("a", bytes(5000))
    assert files.get("a") == bytes(5000)


@pytest.mark.parametrize("disk", ["size=8k", "ro"])
def test_a_disk_that_is_full_or_read_only_is_said_once_and_training_goes_on(tmp_path, disk):
    (folder := tmp_path / "trainkit").mkdir()
    done = begin(tmp_path, "logs", 2, *on_a_disk(folder, f"mode=700,{disk}"))
    out, told = done.communicate(timeout=100)
    assert done.returncode == 0, told
    assert json.loads(out)[0][TRAIN] == 1
    assert told.count("compiled programs are not kept in") == 1
    assert "Warning" not in told
