"""The card of a run: once in its logs, with versions, devices, commit and command line, and without secrets."""

import json
import subprocess
import sys

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainkit as tk
from tests.helpers.infos import Recorder
from tests.helpers.runs import dies_at, saving, sigterm_at
from tests.helpers.weight import numbers, trainer
from trainkit._trainer.run_card import _command, _commit
from trainkit.callbacks import Checkpoint

DATA = numbers(1, 2, 3, 4)


def cards(logdir):
    """The cards in both logs, as (step, text)."""
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    jsonl = [
        (line["step"], text)
        for line in lines
        for name, text in line.get("texts", {}).items()
        if name == "run"
    ]
    events = EventAccumulator(str(logdir)).Reload()
    board = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("run")]
    assert jsonl == board
    return board


def test_a_run_has_one_card_whatever_becomes_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    with pytest.raises(ConnectionError):  # before its first checkpoint
        saving(tmp_path, dies_at(1)).fit(DATA, epochs=2, resume=True)
    for at in (3, 5):
        saving(tmp_path, sigterm_at(at)).fit(DATA, epochs=2, resume=True)
    one = saving(tmp_path)
    one.fit(DATA, epochs=2, resume=True)
    one.fit(DATA, epochs=1)
    ((step, text),) = cards(tmp_path)
    assert step == 0
    for line in (
        f"| trainkit | {tk.__version__} |",
        f"| jax | {jax.__version__} |",
        "| optax | ",
        "| devices | ",
    ):
        assert f"\n{line}" in text
    assert one.summary().splitlines()[0] in text
    assert "hush-hush" not in text
    again = trainer(Checkpoint(), logdir=tmp_path)
    again.restore(tmp_path)
    again.fit(DATA, epochs=1)
    assert len(cards(tmp_path)) == 1
    trainer(Checkpoint(), logdir=tmp_path, overwrite=True).fit(DATA, epochs=1)
    assert len(cards(tmp_path)) == 1


def test_only_the_logs_of_the_run_get_it_and_only_where_it_has_some(tmp_path):
    class Texts(Recorder):
        def write_texts(self, step, texts):
            raise AssertionError("a card in the user's own writer")

    trainer(writers=[Texts()]).fit(DATA, epochs=1)
    trainer(writers=[Texts()], logdir=tmp_path).fit(DATA, epochs=1)
    assert len(cards(tmp_path)) == 1


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    assert _commit(tmp_path) == ""
    git(tmp_path, "init", "-q")
    assert _commit(tmp_path) == ""  # nothing is committed
    (tmp_path / "train.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").write_text("not tracked")
    assert _commit(tmp_path) == commit
    (tmp_path / "train.py").write_text("2")
    assert _commit(tmp_path) == f"{commit} (modified)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _commit(tmp_path) == ""


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "git").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("trainkit._trainer.run_card._SECONDS", 0.2)
    assert _commit(tmp_path) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.py", "--lr", "0.1"], "train.py --lr 0.1"),
        (["train.py", "--api-key=abc", "--lr=1"], "train.py '--api-key=***' --lr=1"),
        (["train.py", "--hf-token", "abc", "x"], "train.py --hf-token '***' x"),
        (["train.py", "WANDB_API_KEY=abc"], "train.py 'WANDB_API_KEY=***'"),
        (["train.py", "--token", "--lr", "1"], "train.py --token --lr 1"),
        (["train.py", "a b|c`d"], "train.py 'a b\\|c'd'"),
    ],
)
def test_the_command_line_has_no_secrets(arguments, said):
    assert _command(arguments) == said
