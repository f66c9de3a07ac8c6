"""`HParams`: what TensorBoard's HPARAMS page shows of runs, and what may stand there."""

import argparse
import contextlib
import dataclasses
import signal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.runs import Script, dies_at, scalars_of, sigterm_at
from tests.helpers.tensorboard_pages import Pages
from tests.helpers.weight import WeightTrainer, numbers, trainer
from trainkit.callbacks import Checkpoint, HParams
from trainkit.writers import read_jsonl

GIVEN = {"model": {"width": 8, "sizes": [1, 2]}, "act": "relu", "augment": True}


def hparams_lines(logdir):
    return [line["hparams"] for line in read_jsonl(logdir / "metrics.jsonl") if "hparams" in line]


def test_the_table_compares_runs_without_a_line_of_the_users(tmp_path):
    for name, width, losses in (("a", 8, {2: 3.0, 4: 5.0}), ("b", 16, {2: 4.0, 4: 2.0})):
        script = Script(losses)
        hparams = {"model": {"width": width, "sizes": [1, 2]}, "act": "relu", "augment": name == "a"}
        made = trainer(script, logdir=tmp_path / name, hparams=hparams, seed=width)
        made.fit(numbers(1, 2), epochs=2, eval_data=script.data)
    rows, (names, metrics) = Pages(tmp_path).hparams()
    own = ["model/width", "model/sizes/0", "model/sizes/1", "act", "augment", "seed", "batch_size"]
    assert sorted(names) == sorted(own)
    assert metrics == ["best/eval/loss", "best/train/loss", "eval/loss", "train/loss"]
    common = {"model/sizes/0": 1, "model/sizes/1": 2, "act": "relu", "batch_size": 4}
    assert rows["a"][0] == {**common, "model/width": 8, "augment": True, "seed": 8}
    assert rows["b"][0] == {**common, "model/width": 16, "augment": False, "seed": 16}
    # The last value under the metric's name, and the best one.
    assert (rows["a"][1]["eval/loss"], rows["a"][1]["best/eval/loss"]) == (5.0, 3.0)
    assert (rows["b"][1]["eval/loss"], rows["b"][1]["best/eval/loss"]) == (2.0, 2.0)


class Linear(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch)[:, 0] - 1) ** 2, {}


def test_injected_values_stand_beside_what_is_given_and_what_is_given_counts(tmp_path):
    inject = optax.inject_hyperparams(optax.sgd)
    tx = optax.partition(
        {"fast": inject(0.25), "slow": inject(0.1, momentum=lambda count: 0.9)},
        {"params": {"kernel": "fast", "bias": "slow"}}["params"],
    )
    hparams = {"seed": 7, "learning_rate": "two"}
    callbacks = [HParams({"batch_size": 99, "note": "mine"})]
    made = Linear(nn.Dense(1), tx, logdir=tmp_path, hparams=hparams, callbacks=callbacks)
    made.fit([np.ones((2, 3), np.float32)], steps=1)
    (found,) = hparams_lines(tmp_path)
    assert found == {
        "seed": 7,
        "learning_rate": "two",
        "batch_size": 99,
        "note": "mine",
        "learning_rate/fast": 0.25,
        "learning_rate/slow": 0.1,  # as float32 shows it, not 0.10000000149
    }
    rows, _ = Pages(tmp_path).hparams()
    assert rows["."][0] == found


def test_off_without_hparams(tmp_path):
    trainer(logdir=tmp_path).fit(numbers(1), steps=1)
    assert not hparams_lines(tmp_path)
    assert not any(name.startswith("best/") for _, name in scalars_of(tmp_path)[0])


def test_an_empty_mapping_logs_what_trainkit_knows(tmp_path):
    trainer(logdir=tmp_path, hparams={}, seed=3).fit(numbers(1), steps=1)
    assert hparams_lines(tmp_path) == [{"seed": 3, "batch_size": 4}]


def test_a_further_fit_writes_them_no_second_time_and_the_best_anew(tmp_path):
    made = trainer(logdir=tmp_path, hparams=GIVEN)
    made.fit(numbers(3), steps=1)
    made.fit(numbers(2, 5), steps=2)
    assert len(hparams_lines(tmp_path)) == 1
    best = {
        step: value for (step, name), value in scalars_of(tmp_path)[1].items() if name == "best/train/loss"
    }
    assert best == {1: 3.0, 3: 3.0}  # of the means 3 and 3.5 that were logged


@pytest.mark.parametrize("first", [dies_at(1), dies_at(5), sigterm_at(3)])
def test_a_resumed_run_has_them_once_and_the_best_of_all(first, tmp_path):
    def fit(*callbacks):
        saves = Checkpoint(every=tk.Every(steps=2))
        log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
        made = trainer(log, saves, *callbacks, logdir=tmp_path, hparams=GIVEN)
        return made.fit(numbers(5, 1, 4, 4, 4, 4), epochs=1, resume=True)

    with contextlib.suppress(ConnectionError):
        assert fit(first).stopped_by == signal.Signals.SIGTERM.name
    fit()
    again = fit()  # nothing is left to do
    assert len(hparams_lines(tmp_path)) == 1
    for log in scalars_of(tmp_path):
        assert {key: value for key, value in log.items() if key[1].startswith("best/")} == {
            (6, "best/train/loss"): 1.0
        }
    assert again.history.best("train/loss", "min") == (2, 1.0)
    assert len(Pages(tmp_path).hparams()[0]) == 1


@pytest.mark.parametrize("hook", ["on_step", "on_fit_end"])
def test_a_run_that_breaks_off_has_its_best_all_the_same(hook, tmp_path):
    def breaks(info):
        if info.step == 2:
            raise ConnectionError

    class Late(tk.callbacks.Lambda):
        phase = tk.callbacks.Phase.MONITOR  # after the best was written

    log = tk.callbacks.LogMetrics(every=tk.Every(steps=1))
    with pytest.raises(ConnectionError) as raised:
        trainer(log, Late(**{hook: breaks}), logdir=tmp_path, hparams={}).fit(numbers(5, 1), epochs=1)
    assert not getattr(raised.value, "__notes__", None)
    best = {key: value for key, value in scalars_of(tmp_path)[1].items() if key[1].startswith("best/")}
    assert best == {(2, "best/train/loss"): 1.0}


def test_another_run_of_the_same_object_writes_its_own(tmp_path):
    callback = HParams({"width": 1})
    trainer(callback, logdir=tmp_path / "a").fit(numbers(1), steps=1)
    trainer(callback, logdir=tmp_path / "b").fit(numbers(1), steps=1)
    assert [len(hparams_lines(tmp_path / name)) for name in "ab"] == [1, 1]


def test_numbers_of_every_kind_are_plain(tmp_path):
    kinds = {
        "f": np.float32(0.1),
        "i": np.int64(3),
        "b": np.bool_(True),
        "j": jnp.float32(0.5),
        "0d": np.array(2),
    }
    trainer(logdir=tmp_path, hparams=kinds, seed=1).fit(numbers(1), steps=1)
    (found,) = hparams_lines(tmp_path)
    assert {name: found[name] for name in kinds} == {"f": 0.1, "i": 3, "b": True, "j": 0.5, "0d": 2}


@dataclasses.dataclass
class Config:
    width: int = 8


@pytest.mark.parametrize(
    ("hparams", "error", "message"),
    [
        (
            {"a": {"w": np.ones(3)}},
            TypeError,
            r"'a/w' is an array of shape \[3\] and dtype float64.*Allowed are bool",
        ),
        ({"act": nn.relu}, TypeError, r"'act' is a .*which TensorBoard's table can't hold.*give its name"),
        ({"clip": None}, TypeError, r"'clip' is None.*leave it out, or write 'none'"),
        ({"z": 1j}, TypeError, "'z' is a complex"),
        ({"cfg": Config()}, TypeError, "'cfg' is a Config"),
        ({"a/b": 1, "a": {"b": 2}}, ValueError, r"the name 'a/b' twice.*Rename one"),
        ({3: 1}, TypeError, "the name 3 in it; names are non-empty strings"),
        ({"a": {"": 1}}, TypeError, "the name '' in a/"),
        (Config(), TypeError, r"got Config\..*dataclasses.asdict"),
        (argparse.Namespace(width=8), TypeError, r"got Namespace.*vars\(args\)"),
        ([("a", 1)], TypeError, "expected a mapping of names to values, got list"),
    ],
)
def test_what_the_table_can_not_hold_is_refused_at_once(hparams, error, message):
    with pytest.raises(error, match=rf"Trainer\(hparams=...\).*{message}"):
        WeightTrainer(nn.Dense(1), optax.sgd(1.0), hparams=hparams)
    with pytest.raises(error, match=rf"HParams\(hparams=...\).*{message}"):
        HParams(hparams)


def test_with_a_writer_of_hparams_of_ones_own_both_are_named(tmp_path):
    own = tk.callbacks.Lambda(on_fit_start=lambda info: info.writer.write_hparams({"a": 1}))
    with pytest.raises(ValueError, match=r"written once; Lambda wrote them, then HParams did"):
        trainer(own, logdir=tmp_path, hparams={}).fit(numbers(1), steps=1)
