"""What surrounds a run and is not as it should be: folders, another run, the process that reads the data."""

import concurrent.futures.process
import functools
import os
import subprocess

import pytest

from tests.faults.reader import batches
from tests.faults.small import STEPS, check_whole, fit, make, steps
from tests.helpers.processes import start_and_wait
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Checkpoint, Lambda


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be made."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    # Permission bits mean nothing to root.
    fixed = not os.geteuid() and subprocess.run(["chattr", "+i", folder], capture_output=True).returncode == 0
    if not fixed and not os.geteuid():
        pytest.skip("root can write everywhere here")
    yield folder
    if fixed:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path, read_only):
    told = "checkpoints need a folder that can be created and written to .*give another"
    trained = []
    note = Lambda(on_step=lambda info: trained.append(info.step))
    for folder in (read_only, read_only / "deeper"):
        made = trainer(Checkpoint(folder=folder), note, logdir=tmp_path / "logs")
        with pytest.raises(OSError, match=told):
            fit(made)
    assert not trained
    with pytest.raises(OSError, match="logdir must be a folder that can be created and written to"):
        fit(make(read_only / "logs"))


def test_a_file_in_place_of_the_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(OSError, match=r"checkpoints need a folder .*File exists"):
        fit(make(tmp_path))
    (tmp_path / "checkpoints").unlink()
    check_whole(tmp_path, fit(make(tmp_path)))


FIRST = """
import pathlib, sys
from tests.faults.small import check_whole, fit, make
from trainkit.callbacks import Lambda

def wait(info):
    if info.step == 7:
        print("ready", flush=True)
        sys.stdin.readline()

logdir = pathlib.Path(sys.argv[1])
check_whole(logdir, fit(make(logdir, Lambda(on_step=wait))))
print("whole")
"""


def test_a_second_run_in_a_folder_is_refused_and_the_first_unharmed(tmp_path):
    process = start_and_wait(FIRST, tmp_path)
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"is being written to by another run .*process {process.pid} "):
            make(tmp_path).fit(numbers(1), steps=1, resume=resume)
    stdout, stderr = process.communicate("\n", timeout=120)
    assert (process.returncode, stdout) == (0, "whole\n"), stderr
    check_whole(tmp_path, fit(make(tmp_path, Lambda())))


def test_a_run_begun_anew_where_there_are_checkpoints_is_refused(tmp_path):
    fit(make(tmp_path))
    before = steps(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds a run already \(logs, checkpoints up to step 12\).*fit\(\.\.\., resume=True\)",
    ):
        make(tmp_path).fit(numbers(1), steps=1, eval_data=numbers(7))
    assert steps(tmp_path) == before


def test_a_killed_data_process_is_named_and_the_run_goes_on_from_before_it(tmp_path):
    with pytest.raises(concurrent.futures.process.BrokenProcessPool, match=r"process.*terminated abruptly"):
        fit(make(tmp_path), functools.partial(batches, STEPS, last=9))
    assert steps(tmp_path) == [4, 6, 8]
    begun = []
    again = make(tmp_path, Lambda(on_fit_start=lambda info: begun.append(info.step)))
    result = fit(again, functools.partial(batches, STEPS))
    assert begun == [8]
    check_whole(tmp_path, result)
