"""Two real processes of two devices each on loopback: they do what one process of four devices does."""

import json
import os
import pathlib
import pickle
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.multi_process.worker import (
    BATCH,
    CASES,
    EXAMPLES,
    HEARTBEAT,
    RESUMED_TO,
    SHUTDOWN,
    examples,
)

ROOT = pathlib.Path(__file__).parents[2]
# Seconds for a process to start, compile and finish on a busy machine.
PATIENCE = 120


def start(job, index, count, port, folder):
    """Starts one of `count` processes with 4 devices together; its output goes to a file."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={4 // count}"
    env = {**os.environ, "XLA_FLAGS": flags, "NPROC": "8"}
    command = [
        sys.executable,
        "-m",
        "tests.multi_process.worker",
        job,
        *map(str, (index, count, port, folder)),
    ]
    with (folder / f"{index}.log").open("w") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture
def pair(tmp_path):
    """A function that starts two processes on a job, which are ended with the test."""
    started = []

    def start_two(job):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started.extend(start(job, index, 2, port, tmp_path) for index in range(2))
        return started

    yield start_two
    for process in started:
        process.kill()
        process.wait()


def log(folder, index):
    return (folder / f"{index}.log").read_text(errors="replace")


def ends(process, index, folder, seconds):
    """Returns the exit status of `process`, which must end within `seconds`."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"process {index} did not end within {seconds} s:\n{log(folder, index)}")


def wait_until_both_train(pair, folder):
    end = time.monotonic() + PATIENCE
    while not all((folder / f"{index}.step").exists() for index in range(2)):
        for index, process in enumerate(pair):
            assert process.poll() is None, log(folder, index)
        assert time.monotonic() < end, log(folder, 0)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process of four devices finds in each case."""
    folder = tmp_path_factory.mktemp("one")
    assert ends(start("compare", 0, 1, 0, folder), 0, folder, PATIENCE) == 0, log(folder, 0)
    return pickle.loads((folder / "0.pickle").read_bytes())


def check_case(mine, other, single):
    """Compares what two processes found, `mine` and `other`, with what one did."""
    for name in ("history", "stopped", "evaluated", "predicted", "params", "stats", "ema"):
        assert_same(other[name], mine[name])
    assert mine["stopped"] == single["stopped"]
    assert mine["stopped"][1].startswith("early stopping")
    for name in ("params", "stats", "ema", "predicted"):
        assert_same(mine[name], single[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mine["rng"], single["rng"])
    for name, rows in single["history"].items():
        np.testing.assert_allclose(mine["history"][name], rows, rtol=1e-5, err_msg=name)


def check_exact(found):
    """Compares an evaluation and the order of a prediction with NumPy on the whole set."""
    data, params = examples(), found["params"]
    np.testing.assert_array_equal(found["predicted"]["number"], data["number"])
    np.testing.assert_array_equal(found["evaluated"]["numbers"], data["number"])
    hidden = np.maximum(data["x"] @ params["first"]["kernel"] + params["first"]["bias"], 0)
    logits = (hidden @ params["last"]["kernel"] + params["last"]["bias"]).astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(EXAMPLES), data["label"]]
    assert found["evaluated"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["evaluated"]["accuracy"] == pytest.approx(
        (logits.argmax(-1) == data["label"]).mean(), rel=1e-6
    )


def check_shares(mine, other):
    """Half of every batch was read by each process; of the last, one example, both read that to pad with."""
    passes = []
    for found in (mine, other):
        *full, last = [found["read"][0, index] for index in range(-(-EXAMPLES // BATCH))]
        # The first batch is read once more, for the initialisation; the last also for the look at what pads it.
        assert full[0][0] == full[0][1]
        assert [len(reads) for reads in full] == [2] + [1] * (len(full) - 1)
        assert {len(reads[0]) for reads in full} == {BATCH // 2}
        passes.append([number for reads in (*full, last) for number in reads[-1]])
        assert len(set(passes[-1])) == len(passes[-1]) == EXAMPLES // 2 + 1
    np.testing.assert_array_equal(np.union1d(*passes), np.arange(EXAMPLES))
    assert np.intersect1d(*passes).size == 1


def test_two_processes_do_what_one_does(pair, tmp_path, one_process):
    for index, process in enumerate(pair("compare")):
        assert ends(process, index, tmp_path, PATIENCE) == 0, log(tmp_path, index)
    first, second = (pickle.loads((tmp_path / f"{index}.pickle").read_bytes()) for index in range(2))
    for name in CASES:
        check_case(first[name], second[name], one_process[name])
        if name != "batch statistics":
            check_exact(first[name])
        check_shares(first[name], second[name])
        assert (tmp_path / "logs-0" / name / "metrics.jsonl").exists()
    assert not (tmp_path / "logs-1").exists()
    assert_same(tk.load(tmp_path / "state.msgpack")["params"], first["jit"]["params"])
    assert "epoch 1/5" in log(tmp_path, 0)
    assert "epoch" not in log(tmp_path, 1)


def test_a_run_of_two_goes_on_as_two_and_as_one(pair, tmp_path):
    for index, process in enumerate(pair("resume")):
        assert ends(process, index, tmp_path, PATIENCE) == 0, log(tmp_path, index)
    first, second = (pickle.loads((tmp_path / f"{index}.pickle").read_bytes()) for index in range(2))
    assert ends(start("resume", 0, 1, 0, tmp_path), 0, tmp_path, PATIENCE) == 0, log(tmp_path, 0)
    alone = pickle.loads((tmp_path / "0.pickle").read_bytes())
    whole, resumed, one = first["whole"], first["resumed"], alone["resumed"]
    assert whole["stopped"] == resumed["stopped"] == one["stopped"]
    for mine in (resumed, second["resumed"], second["whole"]):
        assert_same(mine["state"], whole["state"])  # bit for bit
        assert mine["history"] == whole["history"]
    assert_same(one["state"], whole["state"], rtol=1e-5, atol=1e-6)
    assert one["history"].keys() == whole["history"].keys()
    for key, rows in whole["history"].items():
        np.testing.assert_allclose(one["history"][key], rows, rtol=1e-5, err_msg=key)
    # What the processes of two read is together what one read, batch for batch; one alone reads one ahead.
    reads = [process["resumed"]["read"] for process in (first, second)]
    assert reads[0].keys() == reads[1].keys()
    assert len(reads[0]) >= 5
    assert reads[0].keys() <= one["read"].keys()
    for place in reads[0]:
        parts = {number for read in reads for rows in read[place] for number in rows}
        assert parts == {number for rows in one["read"][place] for number in rows}, place
    for run in ("run", "whole", "copy"):
        kept = tk.checkpoint.verify(tmp_path / run)
        assert [info.step for info in kept][-2:] == [RESUMED_TO - 1, RESUMED_TO]
        assert all(info.problems == () for info in kept)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_an_error(pair, tmp_path, killed):
    processes = pair("endless")
    wait_until_both_train(processes, tmp_path)
    processes[killed].kill()
    other = 1 - killed
    assert ends(processes[other], other, tmp_path, HEARTBEAT + 30) != 0
    assert "another task died" in log(tmp_path, other)


def test_an_exception_on_one_process_ends_the_other_with_an_error(pair, tmp_path):
    processes = pair("failing")
    assert ends(processes[1], 1, tmp_path, PATIENCE) != 0
    assert "a disk of process 1 failed" in log(tmp_path, 1)
    assert ends(processes[0], 0, tmp_path, SHUTDOWN + 30) != 0


def test_a_signal_to_one_process_ends_both_at_the_same_step(pair, tmp_path):
    processes = pair("endless")
    wait_until_both_train(processes, tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    for index, process in enumerate(processes):
        assert ends(process, index, tmp_path, PATIENCE) == 0, log(tmp_path, index)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    assert first == second
    _, stopped_by, evaluated = first
    assert stopped_by == "SIGTERM"
    # By seconds, which the processes measure differently: they agreed on these too.
    assert evaluated


def test_the_example_runs_as_two_processes_on_one_machine(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = ROOT / "examples" / "multihost" / "run_local.sh"
    env = {**os.environ, "PYTHON": sys.executable, "PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [script, "--epochs", "1", "--give-up-after", "20", "--logdir", tmp_path / "logs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"process (\d) of 2: (step 22, test loss \d+\.\d+, accuracy \d\.\d+)", done.stdout)
    assert sorted(index for index, _ in told) == ["0", "1"]
    assert told[0][1] == told[1][1]
    assert (tmp_path / "logs" / "metrics.jsonl").exists()


def test_compiled_programs_are_kept_where_both_processes_find_them(pair, tmp_path):
    for index, process in enumerate(pair("kept")):
        assert ends(process, index, tmp_path, PATIENCE) == 0, log(tmp_path, index)
    (own, *first), (other, *second) = (
        json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)
    )
    # What one finds and the other compiles may be unlike: each with a folder of its own has none.
    assert own == other == [{}, {}]
    assert not list(tmp_path.glob("own-*/trainkit/*"))
    programs = {"jit_init": 1, "jit_laid_out": 1}
    assert first == [[programs, {}], [{}, programs]]
    # The first writes for all. On a CPU the key of JAX is that of one process, so that the others compile.
    assert second == [[programs, {}], [programs, {}]]
    assert len([*tmp_path.glob("shared/trainkit/*.program")]) == len(programs)
    assert not [*tmp_path.glob("shared/trainkit/.*")]


def test_what_one_process_decides_holds_for_both_and_all_rows_are_counted(pair, tmp_path):
    for index, process in enumerate(pair("control")):
        assert ends(process, index, tmp_path, PATIENCE) == 0, log(tmp_path, index)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    # Five batches a pass; the trial, which the first process alone has, is pruned after three of them.
    assert first[:2] == second[:2]
    assert first[0] == 15
    assert first[1].startswith("pruned: eval/loss is ")
    assert first[2] == second[2] == first[1]
    for rates in (first[3], second[3]):
        assert 5 * rates["examples"] == pytest.approx(EXAMPLES)
        assert 5 * rates["numbers"] == pytest.approx(sum(range(EXAMPLES)))
    assert first[4:] == second[4:]
    assert first[5].startswith("stop after 0.5 seconds: ")
    (trace,) = (tmp_path / "run" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.parent.name == "step_2"
