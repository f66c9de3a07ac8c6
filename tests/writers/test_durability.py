"""Killed processes, forks and full disks, for real."""

import subprocess
import sys

import pytest

from tests.helpers.writer_calls import events
from trainkit.writers import read_jsonl


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    prelude = "import os, resource, signal, sys\nfrom trainkit.writers import *\n"
    return subprocess.run([sys.executable, "-c", prelude + code, *args], capture_output=True, text=True)


def steps_of(folder) -> tuple[list[int], list[int]]:
    lines = read_jsonl(folder / "metrics.jsonl")
    return [event.step for event in events(folder).Scalars("x")], [line["step"] for line in lines]


@pytest.mark.parametrize("flush", ["writer.flush()", ""])
def test_nothing_written_is_lost_to_a_kill(tmp_path, flush):
    code = f"""
writer = open_writer(sys.argv[1])
for step in range(50):
    writer.write_scalars(step, {{"x": step}})
{flush}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(code, str(tmp_path))
    assert done.returncode == -9, done.stderr
    assert steps_of(tmp_path) == (list(range(50)), list(range(50)))


def test_a_forked_child_writes_nothing_twice(tmp_path):
    code = """
writer = open_writer(sys.argv[1])
writer.write_scalars(1, {"x": 1.0})
if os.fork() == 0:
    sys.exit(0)
os.wait()
writer.write_scalars(2, {"x": 1.0})
writer.close()
"""
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == ([1, 2], [1, 2])


def test_a_full_disk_leaves_whole_records_and_the_run_goes_on(tmp_path):
    code = """
import warnings
warnings.simplefilter("always")
writer = open_writer(sys.argv[1])
writer.write_scalars(0, {"x": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for step in range(1, 50):
    writer.write_scalars(step, {"x": 1.0})
writer.close()
print("done")
"""
    done = run(code, str(tmp_path))
    assert done.stdout == "done\n", done.stderr
    assert "TensorBoardWriter.write_scalars failed with OSError" in done.stderr
    assert "JsonlWriter.write_scalars failed with OSError" in done.stderr
    for steps in steps_of(tmp_path):
        assert 1 < len(steps) < 50
        assert steps == list(range(len(steps)))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
