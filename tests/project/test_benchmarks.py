"""Every script in benchmarks/ at a tiny size: that it runs to its end and prints and saves what it should."""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
from unittest import mock

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the scripts on the path, as it is when one of them is run."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield FOLDER
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def run(benchmarks, tmp_path, capsys):
    """A function that runs a script in this process, its contestants too; returns the text and the results."""

    def script(name, *arguments):
        file = tmp_path / "results.json"
        argv = [name, "--small", "--data", str(tmp_path / "none"), "--json", str(file), *arguments]
        harness = importlib.import_module("_harness")
        with mock.patch.object(sys, "argv", argv), mock.patch.object(harness, "Worker", Inline):
            runpy.run_path(str(benchmarks / name), run_name="__main__")
        return capsys.readouterr().out, json.loads(file.read_text())["results"]

    return script


class Inline:
    """Stands in for a process of a contestant's own, which takes seconds to import what it needs."""

    pid = os.getpid()

    def __init__(self, contestant, task, tmp):
        tmp.mkdir()
        self._answer = importlib.import_module("_worker").answer
        make = importlib.import_module(contestant.module).CONTESTANTS[contestant.name]
        self._running = make(importlib.import_module("_task").Task.load(task), str(tmp))

    def ask(self, do, **values):
        self.tell(do, **values)
        return self.read()

    def tell(self, do, **values):
        self._last = json.dumps(self._answer(self._running, {"do": do, **values}))

    def answered(self, timeout):
        return True

    def read(self):
        return json.loads(self._last)

    def close(self):
        pass


def agree(result, tolerance=1e-5):
    """Asserts that every row trained to the parameters of the first."""
    assert len(result["differences"]) == len(result["seconds a step"]) > 1
    assert max(result["differences"].values()) <= tolerance


def test_each_contestant_has_a_process_of_its_own_and_trains_as_the_loop_by_hand(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, FOLDER / "steps.py", "--small", "--workloads", "W1", "--json", file]
    only = ["--only", "by hand, CPU settings", "trainkit"]
    done = subprocess.run([*command, *only], capture_output=True, text=True, check=True)
    saved = json.loads(file.read_text())
    agree(saved["results"]["W1"])
    assert saved["machine"]["python"] in done.stdout
    assert list(saved["results"]["W1"]["seconds a step"]) == ["by hand", "by hand, CPU settings", "trainkit"]


def test_steps_train_to_the_same_parameters_with_everything_plugged_in(run):
    text, results = run("steps.py", "--workloads", "W1", "--only", "trainkit, all plugged in")
    agree(results["W1"])
    assert "parameters after 4 steps, trainkit, all plugged in" in text


@pytest.mark.parametrize(
    "workload", [pytest.param("W2", marks=pytest.mark.slow), pytest.param("W3", marks=pytest.mark.slow), "W4"]
)
def test_steps_train_each_workload_to_the_same_parameters(run, workload):
    _, results = run("steps.py", "--workloads", workload, "--only", "trainkit, one a call")
    agree(results[workload])


def test_a_peer_that_is_not_installed_is_left_out_and_said_so(benchmarks, tmp_path):
    harness = importlib.import_module("_harness")
    contestant = harness.Contestant("by hand", "no_such_module")
    task = importlib.import_module("_data").task("W1", small=True)
    task.save(tmp_path / "task")
    with pytest.raises(harness.Missing, match="no_such_module"):
        harness.Worker(contestant, tmp_path / "task", tmp_path / "tmp")


def test_input_runs_both_of_its_tables(run):
    rows = ["trainkit, host data", "source alone", "slow source, trainkit"]
    _, results = run("input.py", "--workloads", "W1", "--only", *rows)
    assert list(results) == ["W1", "slow source"]
    agree(results["W1"])
    # The source alone trains nothing, and it alone: it takes at least what it waits for.
    assert min(results["slow source"]["seconds a step"]["source alone"]) >= 5e-3
    assert max(results["slow source"]["differences"].values()) <= 1e-5


def test_evaluation_computes_the_same_metrics(run):
    _, results = run("evaluation.py", "--workloads", "W1")
    for result in results.values():
        hand, trainkit = (about["notes"] for about in result["about"].values())
        assert trainkit == pytest.approx(hand, rel=1e-5)
        assert set(hand) == {"loss", "accuracy"}


def test_memory_reports_the_programs_and_what_the_process_holds(run):
    rows = ["trainkit, one a call", "trainkit, EMA"]
    text, results = run("memory.py", "--workloads", "W1", "--steps", "20", "--only", *rows)
    assert list(results["W1"]) == ["by hand", "trainkit, one a call", "by hand, EMA", "trainkit, EMA"]
    assert all(programs[0]["alias"] > 0 for programs in results["W1"].values())
    assert results["held"]["by hand"]["samples"][-1][1] > 0
    assert "KiB/1000 steps" in text


def test_growth_runs_all_of_its_tables(run):
    rows = ["trainkit", "trainkit, 10 callbacks"]
    text, results = run("growth.py", "--leaves", "3", "--only", *rows)
    agree(results["3 leaves"])
    assert list(results["callbacks not due"]["seconds a step"]) == [
        "trainkit, 0 callbacks",
        "trainkit, 10 callbacks",
    ]
    assert "4 to         8 steps" in text


@pytest.mark.slow
def test_startup_times_fresh_scripts(run):
    text, results = run("startup.py", "--kinds", "warm", "--only", "trainkit")
    assert list(results["warm"]) == ["by hand, as in Flax's guides", "trainkit"]
    assert all(seconds > 0 for taken in results["warm"].values() for seconds in taken)
    assert "goal 0.5 of the first" in text


def test_gpu_runs_the_large_model(run):
    _, results = run("gpu.py", "--cpu", "--workloads", "R50", "--only", "trainkit, one a call")
    agree(results["R50"])


def test_gpu_measures_nothing_where_there_is_no_accelerator(benchmarks, capsys):
    with mock.patch.object(sys, "argv", ["gpu.py"]):
        runpy.run_path(str(benchmarks / "gpu.py"), run_name="__main__")
    assert "finds no accelerator" in capsys.readouterr().out


def test_callbacks_measures_each_due_and_not_due(run):
    rows = ["Watch, not due", "Watch, every 50 steps", "SpikeGuard, not due"]
    text, results = run("callbacks.py", "--calls", "1", "--only", *rows)
    agree(results["1 a call"])
    assert list(results["1 a call"]["seconds a step"]) == ["none", "SpikeGuard, not due", *rows[:2]]
    assert "1.01" in text
