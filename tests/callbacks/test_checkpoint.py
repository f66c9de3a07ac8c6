"""`Checkpoint`: what a fit saves, when, and what of it is kept."""

import json
import logging
import math

import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.runs import TEN, Script, dies_at, flip, largest_file, saving, sigterm_at, steps_in
from tests.helpers.weight import numbers, trainer, weight
from trainkit.callbacks import Checkpoint, EarlyStopping, Lambda

EACH, TWO = tk.Every(steps=1), tk.Every(steps=2)


def at(*steps):
    return tk.At(steps=steps)


# When and where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [10]), (3, [8, 9, 10]), (None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])]
)
def test_the_newest_are_kept(tmp_path, keep, kept):
    saving(tmp_path, every=EACH, keep=keep).fit(TEN, epochs=1)
    assert steps_in(tmp_path / "checkpoints") == kept


def test_the_end_is_saved_at_no_cadence_and_a_step_once(tmp_path):
    made = []
    keeper = Checkpoint(tk.Every(steps=5), keep=None, best=("eval/loss", "min"))
    plain = keeper.save
    keeper.save = lambda step, make: plain(step, lambda labels: made.append(step) or make(labels))
    script = Script({5: 2.0, 10: 1.0, 7: 1.5})
    asks = Lambda(on_step=lambda info: tk.Save() if info.step in (5, 7) else None)
    trainer(keeper, script, asks, logdir=tmp_path).fit(
        TEN, epochs=1, eval_data=script.data, eval_every=at(5, 7, 10)
    )
    # At 5 the cadence, the best so far and another callback ask; at 10 these, and the end.
    assert made == [5, 7, 10]
    assert steps_in(tmp_path / "checkpoints") == [5, 7, 10]


def test_saving_changes_nothing(tmp_path):
    plain = trainer(logdir=tmp_path / "a").fit(TEN, epochs=2)
    saved = saving(tmp_path / "b", every=EACH).fit(TEN, epochs=2)
    assert weight(saved.state) == weight(plain.state)
    assert dict(saved.history) == dict(plain.history)


def test_a_folder_elsewhere(tmp_path):
    first = trainer(Checkpoint(TWO, folder=tmp_path / "far" / "away"), dies_at(5), logdir=tmp_path / "logs")
    with pytest.raises(ConnectionError):
        first.fit(TEN, epochs=1, resume=True)
    assert steps_in(tmp_path / "far" / "away") == [2, 4]
    assert not (tmp_path / "logs" / "checkpoints").exists()
    second = trainer(Checkpoint(TWO, folder=tmp_path / "far" / "away"))  # no logs: the folder is enough
    assert weight(second.fit(TEN, epochs=1, resume=True).state) == -55
    assert [info.step for info in tk.checkpoint.list(tmp_path / "far" / "away")] == [6, 8, 10]


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    folder = tmp_path / "shared"
    for name in ("2", "old.removed", "11"):
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.tex").write_text("do not lose this")
    trainer(Checkpoint(EACH, keep=1, folder=folder)).fit(TEN[:1], epochs=1)
    trainer(Checkpoint(EACH, keep=1, folder=folder)).fit(TEN[:1], epochs=1, resume=True)
    for name in ("2", "old.removed", "11"):
        assert (folder / name / "thesis.tex").read_text() == "do not lose this"


def test_without_a_folder(tmp_path):
    message = r"Checkpoint has no folder: give the trainer a logdir, or write Checkpoint\(folder="
    with pytest.raises(ValueError, match=message):
        trainer(Checkpoint()).fit(TEN, epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer(Checkpoint()).fit(TEN, epochs=1, resume=True)


def test_to_resume_or_save_there_must_be_a_checkpoint_callback(tmp_path):
    with pytest.raises(ValueError, match=r"resume=True needs checkpoints: add tk.callbacks.Checkpoint\(\)"):
        trainer(logdir=tmp_path).fit(TEN, epochs=1, resume=True)
    asks = Lambda(on_step=lambda info: tk.Save())
    with pytest.raises(RuntimeError, match=r"Lambda returned Save, and nothing saves: add tk.callbacks"):
        trainer(asks).fit(TEN, epochs=1)


def test_save_is_asked_of_every_checkpoint(tmp_path):
    asks = Lambda(on_step=lambda info: tk.Save() if info.step == 3 else None)
    keepers = [Checkpoint(tk.Never(), folder=tmp_path / name) for name in "ab"]
    trainer(asks, *keepers).fit(TEN, epochs=1)
    assert steps_in(tmp_path / "a") == steps_in(tmp_path / "b") == [3, 10]


def test_a_step_before_the_newest_checkpoint_is_no_place_to_go_on_from(tmp_path):
    saving(tmp_path, every=tk.Every(steps=5)).fit(TEN, epochs=1)
    logged = (tmp_path / "metrics.jsonl").read_bytes()
    made = saving(tmp_path)
    made.restore(tmp_path, step=5)
    message = r"has checkpoints of the steps 10, and this fit begins at step 5.*another logdir.*resume=True"
    with pytest.raises(ValueError, match=message):
        made.fit(TEN, epochs=1)
    assert steps_in(tmp_path / "checkpoints") == [5, 10]
    assert (tmp_path / "metrics.jsonl").read_bytes() == logged


def test_two_fits_go_on(tmp_path):
    made = saving(tmp_path, every=tk.Every(steps=4))
    made.fit(TEN, steps=4)
    assert made.fit(TEN, steps=4).step == 8
    assert steps_in(tmp_path / "checkpoints") == [4, 8]


def test_one_callback_for_two_trainers(tmp_path):
    keeper, script = (
        Checkpoint(tk.Never(), best=("eval/loss", "min"), keep=1),
        Script({2: 1.0, 3: 5.0, 1: 8.0}),
    )
    trainer(keeper, script, logdir=tmp_path / "a").fit(TEN, steps=3, eval_data=script.data, eval_every=EACH)
    assert steps_in(tmp_path / "a" / "checkpoints") == [2, 3]
    script.losses = {1: 9.0, 2: 7.0, 3: 8.0}  # worse than the best of the other run, each of them
    trainer(keeper, script, logdir=tmp_path / "b").fit(TEN, steps=3, eval_data=script.data, eval_every=EACH)
    assert steps_in(tmp_path / "b" / "checkpoints") == [2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, r"keep=0.*the newest one is what a resumed run needs"),
        ({"keep": 2.5}, ValueError, r"keep=2\.5"),
        ({"every": 5}, TypeError, r"every=5: expected tk\.Every"),
        ({"best": "eval/loss"}, ValueError, r"expected a name and a mode, e\.g\. \('eval/loss', 'min'\)"),
        ({"best": ("eval/loss", "lowest")}, ValueError, r"the mode is 'min' or 'max'"),
        ({"best": ("eval/loss", "min"), "top": 0}, ValueError, r"top=0\): must be an int, 1 or more"),
        ({"top": 2}, ValueError, r"top=2\) keeps the best by a metric: say which, e\.g\. best="),
        ({"metadata": {"a": object()}}, TypeError, r"metadata=\.\.\.\) must be JSON"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Checkpoint(**options)


# The best ---------------------------------------------------------------------------------------------------

RANKED = {2: 5.0, 4: 1.5, 6: 1.5, 8: math.nan, 10: 3.0}


def ranked(logdir, script, *callbacks, mode="min", every=None):
    keeper = {"every": every or tk.Every(steps=3), "keep": 1, "best": ("eval/loss", mode)}
    made = saving(logdir, script, *callbacks, **keeper)
    return made, made.fit(TEN, epochs=1, eval_data=script.data, eval_every=TWO, resume=True)


def test_the_best_is_saved_where_it_was_measured(tmp_path):
    ranked(tmp_path, Script(RANKED))
    # 4 was the best, and 6 no better; every third step comes at 3, 6 and 9.
    assert {info.step: info.scores for info in tk.checkpoint.list(tmp_path)} == {
        4: {"eval/loss": 1.5},
        10: {"eval/loss": 3.0},
    }
    made = trainer()
    assert made.restore(tmp_path, step="best").step == 4
    assert weight(made.state) == -(1 + 2 + 3 + 4)
    assert made.restore(tmp_path, step="latest").step == 10


def test_the_best_by_the_maximum_is_not_one_that_is_nan(tmp_path):
    ranked(tmp_path, Script({**RANKED, 4: math.nan, 6: 7.0}), mode="max")
    assert trainer().restore(tmp_path, step="best").step == 6


def test_a_run_whose_metric_is_never_a_number_has_no_best(tmp_path):
    ranked(tmp_path, Script(dict.fromkeys(RANKED, math.nan)))
    with pytest.raises(ValueError, match="no checkpoint has a value of eval/loss"):
        trainer().restore(tmp_path, step="best")


def test_without_a_ranking_there_is_no_best(tmp_path):
    saving(tmp_path).fit(TEN, epochs=1)
    with pytest.raises(
        ValueError, match=r"saved without a ranking.*Checkpoint\(best=\('eval/loss', 'min'\)\)"
    ):
        trainer().restore(tmp_path, step="best")


@pytest.mark.parametrize("best_at", [4, 10])
def test_an_evaluation_broken_off_still_ranks_when_it_is_done_after_the_resume(tmp_path, best_at):
    losses = {**dict.fromkeys(RANKED, 5.0), best_at: 0.5}
    first = Script(losses)
    _, result = ranked(tmp_path, first, sigterm_at(best_at, "on_eval_start"))
    assert (result.step, result.stopped_by) == (best_at, "SIGTERM")
    assert tk.checkpoint.list(tmp_path)[-1].scores == {}
    made, result = ranked(tmp_path, Script(losses))
    assert (result.step, result.stopped_by) == (10, None)
    assert [info.step for info in tk.checkpoint.list(tmp_path)] == sorted({best_at, 10})
    assert trainer().restore(tmp_path, step="best").step == best_at
    assert made.history["eval/loss"] == [(step, losses[step]) for step in sorted(RANKED)]


def test_what_was_best_before_a_resume_is_remembered(tmp_path):
    losses = {2: 1.0, 4: 5.0, 6: 4.0, 8: 3.0, 10: 2.0}
    ranked(tmp_path, Script(losses), sigterm_at(5))
    ranked(tmp_path, Script(losses))
    assert [info.step for info in tk.checkpoint.list(tmp_path)] == [2, 10]


def test_a_name_that_is_not_measured_is_told_at_the_first_evaluation(tmp_path):
    script = Script(RANKED)
    made = saving(tmp_path, script, best=("eval/lost", "min"))
    with pytest.raises(
        ValueError, match=r"best=\('eval/lost', \.\.\.\)\): there is no such metric.*eval/loss"
    ):
        made.fit(TEN, epochs=1, eval_data=script.data, eval_every=TWO)


# Runs that go on --------------------------------------------------------------------------------------------


def test_two_fits_in_one_program_of_which_the_second_was_broken_off(tmp_path):
    def program(logdir, *callbacks):
        made = saving(logdir, *callbacks, every=tk.Every(steps=3))
        results = [made.fit(TEN, epochs=1, resume=True), made.fit(TEN[:4], epochs=2, resume=True)]
        return results, made

    _, whole = program(tmp_path / "whole")
    with pytest.raises(ConnectionError):
        program(tmp_path / "broken", dies_at(16))
    seen = []
    note = Lambda(every=EACH, on_step=lambda info: seen.append(info.step))
    results, made = program(tmp_path / "broken", note)
    # The first fit was done, and returns at once; the second goes on from its checkpoint of step 15.
    assert seen == [16, 17, 18]
    assert [(result.step, result.stopped_by) for result in results] == [(15, None), (18, None)]
    assert weight(made.state) == weight(whole.state) == -(55 + 2 * 10)
    assert dict(made.history) == dict(whole.history)


def test_two_fits_of_which_the_second_died_before_it_saved(tmp_path):
    def program(*callbacks):
        made = saving(tmp_path, *callbacks, every=tk.Every(steps=10))
        made.fit(TEN, epochs=1, resume=True)
        return made.fit(TEN[:4], epochs=2, resume=True)

    with pytest.raises(ConnectionError):
        program(dies_at(16))
    result = program()
    assert (result.step, weight(result.state)) == (18, -75)
    assert [step for step, _ in result.history["train/loss"]] == sorted(
        {s for s, _ in result.history["train/loss"]}
    )


def test_a_second_checkpoint_folder_may_hold_the_newer_ones(tmp_path):
    def program(*callbacks):
        keepers = [
            Checkpoint(tk.Every(steps=4), folder=tmp_path / "a"),
            Checkpoint(TWO, folder=tmp_path / "b"),
        ]
        return trainer(*keepers, *callbacks, logdir=tmp_path).fit(TEN, epochs=1, resume=True)

    with pytest.raises(ConnectionError):
        program(dies_at(7))
    assert (steps_in(tmp_path / "a"), steps_in(tmp_path / "b")) == ([4], [2, 4, 6])
    seen = []
    result = program(Lambda(every=EACH, on_step=lambda info: seen.append(info.step)))
    assert seen == [7, 8, 9, 10]
    assert weight(result.state) == -55
    assert (steps_in(tmp_path / "a"), steps_in(tmp_path / "b")) == ([4, 8, 10], [6, 8, 10])


def test_a_small_last_batch_is_padded_alike_by_the_run_that_goes_on(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x))))

    class Regression(tk.Trainer):
        def loss(self, model, batch, ctx):
            return optax.l2_loss(model(batch["x"], ctx.train), batch["y"]).mean(-1), {}

    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(20, 3)).astype(np.float32),
        "y": rng.normal(size=(20, 1)).astype(np.float32),
    }

    def run(logdir, *callbacks):
        made = Regression(Net(), optax.adam(0.01), callbacks=[Checkpoint(), *callbacks], logdir=logdir)
        result = made.fit(tk.data.Arrays(data, 8), epochs=3, resume=True)
        return result, made._engine.steps.traces.count("training")

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "broken", sigterm_at(5))  # what is left of the pass is the batch of 4
    result, traces = run(tmp_path / "broken")
    for a, b in zip(*(one.state.params["Dense_0"].values() for one in (result, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert traces == 1


def test_a_stop_early_and_its_best_state_survive(tmp_path):
    losses = {step: abs(step - 3) + 1.0 for step in range(1, 11)}

    def run(logdir, *callbacks):
        script = Script(losses)
        stopping = EarlyStopping("eval/loss", mode="min", patience=4, restore_best=True)
        made = saving(logdir, script, stopping, *callbacks, every=tk.Every(steps=5))
        return made.fit(TEN, epochs=1, eval_data=script.data, eval_every=EACH, resume=True)

    whole = run(tmp_path / "whole")
    assert whole.stopped_by.startswith("early stopping")
    for broken_at in (3, 4, 6, 7):
        folder = tmp_path / str(broken_at)
        run(folder, sigterm_at(broken_at))
        result = run(folder)
        assert (result.step, result.stopped_by) == (whole.step, whole.stopped_by)
        assert weight(result.state) == weight(whole.state) == -(1 + 2 + 3)
        assert dict(result.history) == dict(whole.history)


def test_metadata_and_versions_are_kept(tmp_path):
    config = {"model": "cnn", "widths": [8, 16], "note": "\u00fc"}
    saving(tmp_path, metadata=config).fit(numbers(1), epochs=1)
    (info,) = tk.checkpoint.list(tmp_path)
    assert info.metadata == config
    meta = json.loads((info.path / "meta.json").read_text())
    assert meta["versions"].keys() == {"trainkit", "jax"}
    assert meta["arrays"]["params/w"] == ["float32", []]


def test_a_damaged_newest_is_set_aside_and_the_one_before_it_taken(tmp_path, caplog):
    with pytest.raises(ConnectionError):
        saving(tmp_path, dies_at(7), every=TWO).fit(TEN, epochs=1, resume=True)
    flip(largest_file(tmp_path / "checkpoints" / "6"))
    with caplog.at_level(logging.WARNING, "trainkit"):
        result = saving(tmp_path, every=TWO).fit(TEN, epochs=1, resume=True)
    assert "the checkpoint of step 6 is damaged" in caplog.text
    assert "the newest whole checkpoint is that of step 4" in caplog.text
    assert weight(result.state) == -55
    assert (tmp_path / "checkpoints" / "6.damaged").is_dir()
    for step in (6, 8, 10):
        assert (tmp_path / "checkpoints" / str(step)).is_dir()


def test_where_all_are_damaged_nothing_is_begun_afresh(tmp_path):
    saving(tmp_path, every=tk.Every(steps=5)).fit(TEN, epochs=1)
    for step in (5, 10):
        flip(largest_file(tmp_path / "checkpoints" / str(step)))
    with pytest.raises(
        ValueError, match=r"every checkpoint in .* is damaged \(step 10: .*; step 5: .*start afresh"
    ):
        saving(tmp_path).fit(TEN, epochs=1, resume=True)
    assert steps_in(tmp_path / "checkpoints") == [5, 10]


# More than one of the best ------------------------------------------------------------------------------------


def topped(logdir, script, *callbacks, top, keep=1, mode="min", steps=10):
    made = saving(logdir, script, *callbacks, every=tk.Never(), keep=keep, best=("eval/loss", mode), top=top)
    return made.fit(TEN, steps=steps, eval_data=script.data, eval_every=EACH, resume=True)


VALUES = dict(enumerate([5.0, 3.0, math.nan, 4.0, 3.0, 2.0, 9.0, 3.0, 8.0, 7.0], start=1))


def test_the_best_three_are_kept_and_the_newest(tmp_path):
    made = []
    asks = Lambda(every=EACH, on_step=lambda info: made.append(steps_in(tmp_path / "checkpoints")))
    topped(tmp_path, Script(VALUES), asks, top=3)
    # By value: 6 (2.0), 2, 5 and 8 (3.0, of which the older stay); 10 is the newest.
    assert steps_in(tmp_path / "checkpoints") == [2, 5, 6, 10]
    assert trainer().restore(tmp_path, step="best").step == 6


def test_the_largest_three(tmp_path):
    topped(tmp_path, Script(VALUES), top=3, mode="max")
    assert steps_in(tmp_path / "checkpoints") == [7, 9, 10]


def test_the_best_so_far_survive_a_resume(tmp_path):
    with pytest.raises(ConnectionError):
        # What was evaluated at 6 was saved before the machine was gone.
        topped(tmp_path / "a", Script(VALUES), dies_at(7), top=2)
    script = Script(VALUES)
    topped(tmp_path / "a", script, top=2)
    topped(tmp_path / "b", Script(VALUES), top=2)
    assert steps_in(tmp_path / "a" / "checkpoints") == steps_in(tmp_path / "b" / "checkpoints") == [2, 6, 10]


def test_every_so_many_seconds(tmp_path):
    # Any step takes longer than that.
    saving(tmp_path, every=tk.Every(seconds=1e-9), keep=None).fit(TEN, epochs=1)
    assert steps_in(tmp_path / "checkpoints") == list(range(1, 11))
    saving(tmp_path / "late", every=tk.Every(seconds=1e9), keep=None).fit(TEN, epochs=1)
    assert steps_in(tmp_path / "late" / "checkpoints") == [10]


def test_two_for_one_folder(tmp_path):
    made = trainer(Checkpoint(EACH), Checkpoint(TWO, weights_only=True), logdir=tmp_path)
    with pytest.raises(ValueError, match=r"two Checkpoints save to .*checkpoints'.*give one another folder="):
        made.fit(TEN, epochs=1)
