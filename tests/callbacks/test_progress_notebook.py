"""`Progress` in a notebook: one display drawn over itself, in a shell that only looks like one and in a real kernel."""

import sys
import types

import pytest

from tests.helpers.infos import make_info
from trainkit.callbacks import Plan, Progress


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


class Display:
    """A notebook that remembers its pictures; `displays` counts the outputs it was asked for."""

    def __init__(self):
        self.displays, self.pictures, self.error = 0, [], None

    def display(self, picture, *, display_id):
        assert display_id is True
        self.displays += 1
        self.update(picture)
        return self

    def update(self, picture):
        if self.error is not None:
            raise self.error
        self.pictures.append((repr(picture), picture._repr_html_()))


@pytest.fixture
def notebook(monkeypatch):
    shown = Display()
    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display, module.display = module, shown.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def fit(progress, clock, steps=5, plan=Plan(steps=5, epochs=1, eval_names=("eval",)), ends=True):  # noqa: B008
    progress.on_fit_start(make_info(0, epoch=0, plan=plan))
    for step in range(1, steps + 1):
        clock.seconds += 1
        progress.on_step(make_info(step, {"train/loss": 1 / step, "train/<b>": 2.0}, plan=plan))
    progress.on_eval_start(make_info(steps, plan=plan))
    progress.on_eval_end(make_info(steps, {"eval/loss": 0.25}, plan=plan))
    if ends:
        progress.on_fit_end(make_info(steps, {}, plan=plan))
    progress.close()


def test_one_display_shows_the_bar_and_the_table(notebook, capfd):
    clock = Clock()
    fit(Progress(clock=clock), clock)
    assert notebook.displays == 1
    text, html = notebook.pictures[-1]
    assert text == "epoch 1/1  step 5/5  1.0 steps/s  0:00:05  train loss 0.2 <b> 2  eval loss 0.25"
    assert "width:100.0%" in html
    for word in ("epoch 1/1", "5/5", ">loss<", ">train<", ">eval<", ">0.25<", ">&lt;b&gt;<"):
        assert word in html
    assert "<b> 2" not in html
    assert capfd.readouterr() == ("", "")


def test_it_draws_at_most_four_times_a_second_and_always_the_last(notebook):
    clock = Clock()
    progress = Progress(clock=clock)
    progress.on_fit_start(make_info())
    for step in range(1, 101):
        clock.seconds += 0.01
        progress.on_step(make_info(step))
    progress.on_fit_end(make_info(100))
    assert len(notebook.pictures) <= 2 + 4
    assert "100/100" in notebook.pictures[-1][0]


def test_run_again_a_cell_gets_a_display_of_its_own(notebook):
    clock = Clock()
    progress = Progress(clock=clock)
    fit(progress, clock)
    fit(progress, clock)
    assert notebook.displays == 2


def test_a_fit_that_is_broken_off_says_so(notebook):
    clock = Clock()
    progress = Progress(clock=clock)
    fit(progress, clock, steps=3, ends=False)
    assert "broken off" in notebook.pictures[-1][1]
    assert "3/5" in notebook.pictures[-1][0]


def test_a_fit_of_unknown_length_has_no_bar(notebook):
    clock = Clock()
    fit(Progress(clock=clock), clock, plan=Plan(), ends=False)
    assert "width:" not in notebook.pictures[-1][1].replace("max-width:", "")


def test_a_front_end_that_fails_does_not_end_the_fit(notebook, caplog):
    clock = Clock()
    notebook.error = RuntimeError("the socket is closed")
    fit(Progress(clock=clock), clock)
    assert "Progress can't write any more" in caplog.text
    assert "RuntimeError: the socket is closed" in caplog.text


def test_a_stream_that_is_given_is_written_to(notebook, capsys):
    clock = Clock()
    fit(Progress(clock=clock, stream=sys.stdout), clock)
    assert notebook.displays == 0
    assert "step 5/5" in capsys.readouterr().out


CELL = """
from tests.helpers.weight import trainer, numbers
from trainkit.callbacks import Lambda, Progress
import os, signal
def stop(info):
    if info.step == {stop}:
        os.kill(os.getpid(), signal.SIGINT)
result = trainer(Progress(), Lambda(on_step=stop)).fit(numbers(1, 2, 3, 4), epochs=3, eval_data=numbers(7))
result.stopped_by
"""


@pytest.mark.filterwarnings("ignore")
def test_in_the_kernel_of_a_real_notebook():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(CELL.format(stop=stop)) for stop in (0, 5)]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    for cell, step, stopped in zip(book.cells, (12, 5), ("", "'SIGINT'"), strict=True):
        shown = [output for output in cell.outputs if output.output_type == "display_data"]
        assert len(shown) == 1  # drawn over, not one below the other
        assert f"{step}/12" in shown[0].data["text/html"]
        assert f"step {step}/12" in shown[0].data["text/plain"]
        assert [output for output in cell.outputs if output.output_type == "stream"] == []
        found = [
            output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"
        ]
        assert found == [stopped] * bool(stopped)
