"""To which run a callback belongs, and where a run stands after its best state was restored."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.callbacks.registry import REGISTRY
from tests.helpers.runs import Script, assert_equal, scalars_of, sigterm_at, steps_in
from tests.helpers.weight import Weight, WeightTrainer, numbers, trainer, weight
from trainkit.callbacks import (
    EMA,
    SWA,
    Callback,
    Checkpoint,
    EarlyStopping,
    EvalView,
    Lambda,
    LearningRate,
    LogMetrics,
    NanGuard,
    ReduceOnPlateau,
)
from trainkit.checkpoint._store import Store

EACH = tk.Every(steps=1)
DATA = numbers(*range(1, 11))


def made(*callbacks, **options):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    return WeightTrainer(Weight(), tx, callbacks=callbacks, **options)


MEASURED = ("memory/", "throughput/", "time/")
"""What the names in the logs begin with whose values no two runs have in common."""

SHIPPED = {
    **{name: lambda folder, make=make: make() for name, make in REGISTRY.items()},
    "Checkpoint": lambda folder: Checkpoint(EACH, best=("eval/loss", "min"), folder=folder),
    "EMA": lambda folder: EMA(0.5),
    "EarlyStopping": lambda folder: EarlyStopping("eval/loss", mode="min", patience=1, restore_best=True),
    "EvalView": lambda folder: EvalView(lambda state: state),
    "Finetune": lambda folder: tk.callbacks.Finetune({"w": tk.At(steps=(2,))}),
    "Lambda": lambda folder: Lambda(on_step=lambda info: None),
    "LearningRate": lambda folder: LearningRate(EACH),
    "LogMetrics": lambda folder: LogMetrics(EACH),
    "NanGuard": lambda folder: NanGuard("skip", EACH),
    "ReduceOnPlateau": lambda folder: ReduceOnPlateau("eval/loss", mode="min", patience=1),
    "SWA": lambda folder: SWA(2),
}


WANT_MORE = {"ActivationStats", "ConfusionMatrix"}
"""Those that want layers or classes, which this model has not: `check_callback` tries them in another run."""


def test_every_shipped_callback_is_among_those_tried():
    there = {
        name
        for name in tk.callbacks.__all__
        if isinstance(one := getattr(tk.callbacks, name), type)
        and issubclass(one, Callback)
        and one is not Callback
    }
    assert there == SHIPPED.keys()


def folds(callbacks, script, options):
    """Two runs in one trainer, each from a state that was set: what they came to, as plain numbers."""
    results = []
    one = made(script, *callbacks(0), **options)
    start = one.init(DATA[0])
    for fold in range(2):
        one._callbacks = (script, *callbacks(fold))
        one.state = start
        one._run.history.rewind(-1)
        result = one.fit(DATA, steps=3, eval_data=script.data, eval_every=EACH)
        history = {
            name: [] if name.startswith(MEASURED) else series for name, series in result.history.items()
        }
        results.append((result.step, result.stopped_by, weight(result.state), history))
    return results


@pytest.mark.parametrize("name", sorted(SHIPPED.keys() - WANT_MORE))
def test_a_callback_given_to_another_run_begins_afresh(name, tmp_path):
    # At first ever better, then ever worse: what is remembered of the first run would show in the second.
    losses = {1: 3.0, 2: 2.0, 3: 1.0}

    class Other(Script):
        """Worse in each run than in the one before."""

        runs = 0

        def on_fit_start(self, info):
            self.runs += 1

        def data(self):
            return iter(numbers(self.losses[self.step] + 10 * self.runs))

    kept = SHIPPED[name](tmp_path / "one")
    same = folds(lambda fold: (emptied(kept, tmp_path / "one"),), Other(losses), {})
    fresh = folds(lambda fold: (SHIPPED[name](tmp_path / f"fresh{fold}"),), Other(losses), {})
    assert same == fresh


def emptied(callback, folder):
    """The callback, without the checkpoints of the run before it."""
    for path in folder.glob("*") if folder.exists() else ():
        path.rename(folder.parent / f"{path.name}-of-the-first")
    return callback


class Counting(Callback):
    """A callback of a user, who says what it remembers and nothing else."""

    def __init__(self):
        self.seen = 0

    def on_step(self, info):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Own(Counting):
    def __init__(self):
        super().__init__()
        self.resets = 0

    def reset(self):
        self.resets += 1
        super().reset()


AGAIN = {
    "another trainer": lambda one, callback: trainer(callback),
    "a state that was set": lambda one, callback: setattr(one, "state", one.state) or one,
    "a reset": lambda one, callback: one.reset() or one,
    "an init": lambda one, callback: one.init(DATA[0]) and one,
}


@pytest.mark.parametrize("what", AGAIN)
def test_a_callback_of_a_user_goes_on_in_its_run_and_begins_afresh_in_another(what):
    callback = Own()
    one = trainer(callback)
    one.fit(DATA, steps=3)
    one.fit(DATA, steps=2)
    assert (callback.seen, callback.resets) == (5, 0)
    AGAIN[what](one, callback).fit(DATA, steps=4)
    assert (callback.seen, callback.resets) == (4, 1)


def test_a_callback_begins_afresh_after_restore_and_after_part_of_one(tmp_path):
    callback = Own()
    one = trainer(callback, Checkpoint(folder=tmp_path))
    one.fit(DATA, steps=3)
    for partial in (False, True):
        one.restore(tmp_path, step=3, partial=partial)
        one.fit(DATA, steps=2)
        assert callback.seen == 2
        for step in steps_in(tmp_path):
            if step > 3:
                (tmp_path / str(step)).rename(tmp_path.parent / f"{step}-{partial}")
    assert callback.resets == 2


def test_reset_is_as_new_with_what_was_compiled_kept():
    # Own programs: the shared ones may have been compiled by other tests.
    one = made(LogMetrics(EACH), seed=3)
    first = one.fit(DATA, steps=4)
    assert one.reset() is None
    with pytest.raises(RuntimeError, match="no state yet"):
        _ = one.state
    assert dict(one.history) == {}
    again = one.fit(DATA, steps=4)
    assert_equal(again.state, first.state)
    assert (again.step, again.epoch, dict(again.history)) == (4, 1, dict(first.history))
    one.reset(seed=4)
    assert_equal(one.init(DATA[0]), made(seed=4).init(DATA[0]))
    assert one._engine.steps.traces.count("training") == 1


# After restore_best -----------------------------------------------------------------------------------------

# The best is that of step 2; two worse ones later the fit stops.
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 0.5, 6: 2.5}


def best(script, logdir=None, *more, patience=2, **options):
    return trainer(
        script,
        LogMetrics(EACH),
        EarlyStopping("eval/loss", mode="min", patience=patience, restore_best=True),
        *more,
        logdir=logdir,
        **options,
    )


def fit(one, script, steps=6, **options):
    return one.fit(DATA, steps=steps, eval_data=script.data, eval_every=EACH, **options)


def logged(result, name="train/loss"):
    return [step for step, _ in result.history[name]]


@pytest.mark.parametrize("patience", [2, 9], ids=["stopped", "to the end"])
def test_after_restore_best_the_run_stands_at_the_best_step(tmp_path, patience):
    script = Script({**LOSSES, 5: 3.0})
    one = best(script, tmp_path, Checkpoint(EACH, keep=9), patience=patience)
    result = fit(one, script)
    assert (result.step, int(result.state.step), weight(result.state)) == (2, 2, -3)
    assert steps_in(tmp_path / "checkpoints") == [1, 2]
    fresh = trainer()
    fresh.restore(tmp_path)
    assert_equal(fresh.state, result.state)
    # Logs and history keep what came after it.
    last = 4 if patience == 2 else 6
    assert logged(result) == logged(result, "eval/loss") == list(range(1, last + 1))
    for log in scalars_of(tmp_path):
        assert sorted(step for step, name in log if name == "train/loss") == list(range(1, last + 1))


def test_a_further_fit_takes_that_back_so_that_no_step_is_logged_twice(tmp_path):
    script = Script(LOSSES)
    one = best(script, tmp_path, Checkpoint(EACH, keep=9))
    assert fit(one, script).step == 2
    # Steps 3 and 4 are done again, on the batches that follow; now step 5 is the best.
    script.losses = {**LOSSES, 4: 0.9}
    result = fit(one, script, steps=4)
    assert result.step == 5
    assert steps_in(tmp_path / "checkpoints") == [1, 2, 3, 4, 5]
    assert logged(result) == logged(result, "eval/loss") == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in result.history["train/loss"]] == [1, 2, 5, 6, 7, 8]
    for log in scalars_of(tmp_path):
        assert {step: value for (step, name), value in log.items() if name == "train/loss"} == {
            1: 1,
            2: 2,
            3: 5,
            4: 6,
            5: 7,
            6: 8,
        }


@pytest.mark.parametrize("patience", [2, 9], ids=["stopped", "to the end"])
def test_a_run_that_went_back_is_over_for_the_same_command_started_again(tmp_path, patience):
    script = Script({**LOSSES, 5: 3.0})
    first = fit(best(script, tmp_path, Checkpoint(EACH), patience=patience), script, resume=True)
    told = []
    one = best(
        script, tmp_path, Checkpoint(EACH), Lambda(on_step=lambda info: told.append(1)), patience=patience
    )
    again = fit(one, script, resume=True)
    assert not told
    assert (again.step, again.stopped_by, dict(again.history)) == (2, first.stopped_by, dict(first.history))
    assert_equal(again.state, first.state)
    # The next fit of the script goes on from there.
    further = fit(one, script, steps=1, resume=True)
    assert logged(further) == [1, 2, 3]


def test_broken_off_while_it_goes_back_it_goes_back_again(tmp_path, monkeypatch):
    script = Script(LOSSES)
    expected = fit(best(script, tmp_path / "whole", Checkpoint(EACH)), script, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", dies)
        with pytest.raises(ConnectionError):
            fit(best(script, tmp_path / "cut", Checkpoint(EACH, keep=9)), script, resume=True)
    assert steps_in(tmp_path / "cut" / "checkpoints") == [1, 2, 3, 4]
    result = fit(best(script, tmp_path / "cut", Checkpoint(EACH, keep=9)), script, resume=True)
    assert (result.step, result.stopped_by) == (2, expected.stopped_by)
    assert steps_in(tmp_path / "cut" / "checkpoints") == [1, 2]
    assert_equal(result.state, expected.state)


def dies(self, step):
    raise ConnectionError("the machine is gone")


def test_without_checkpoints_it_stands_there_as_well():
    script = Script(LOSSES)
    one = best(script)
    assert fit(one, script).step == 2
    assert logged(fit(one, script, steps=1)) == [1, 2, 3]


def test_a_signal_takes_nothing_back(tmp_path):
    script = Script(LOSSES)
    result = fit(best(script, tmp_path, Checkpoint(EACH), sigterm_at(3)), script, resume=True)
    assert (result.step, result.stopped_by, weight(result.state)) == (3, "SIGTERM", -6)
    whole = fit(best(script, tmp_path / "whole", Checkpoint(EACH)), script, resume=True)
    again = fit(best(script, tmp_path, Checkpoint(EACH)), script, resume=True)
    assert (again.step, again.stopped_by) == (whole.step, whole.stopped_by)
    assert_equal(again.state, whole.state)
    assert dict(again.history) == dict(whole.history)


def test_an_update_that_moves_the_step_in_the_middle_of_a_fit_is_refused():
    def back(info):
        return tk.Update(lambda state: state.replace(step=state.step - 1))

    with pytest.raises(
        ValueError, match=r"Lambda returned an Update that changes state.step from 1 to 0.*Rollback"
    ):
        trainer(Lambda(on_step=back)).fit(DATA, steps=3)

    def ahead(info):
        return tk.Update(lambda state: state.replace(step=state.step + 1))

    with pytest.raises(ValueError, match="from 3 to 4"):
        trainer(Lambda(on_fit_end=ahead)).fit(DATA, steps=3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda state: state.replace(tx=optax.adam(1.0)),
            ValueError,
            "replaces state.tx.*optax.inject_hyperparams",
        ),
        (lambda state: state.replace(apply_fn=print), ValueError, "replaces state.apply_fn"),
        (lambda state: state.params, TypeError, "whose function returned dict: return the state"),
    ],
)
def test_an_update_of_what_is_compiled_into_the_step_is_refused_with_the_reason(change, error, message):
    with pytest.raises(error, match=message):
        trainer(Lambda(on_step=lambda info: tk.Update(change))).fit(DATA, steps=1)


def test_what_a_step_counts_is_kept_where_an_update_keeps_it():
    def same(info):
        return tk.Update(lambda state: jax.tree.map(lambda leaf: leaf, state))

    result = trainer(Lambda(on_step=same)).fit(DATA, steps=3)
    assert (result.step, weight(result.state)) == (3, -6)
    np.testing.assert_array_equal(result.state.step, 3)


def test_a_run_that_went_back_goes_on_from_there_for_a_command_that_asks_for_more(tmp_path):
    script = Script({**LOSSES, 5: 3.0, 6: 0.5})
    fit(best(script, tmp_path, Checkpoint(EACH), patience=9), script, steps=4, resume=True)
    # Started again with six steps in place of four: steps 3 and 4 are done again, each stands once in the logs.
    result = fit(best(script, tmp_path, Checkpoint(EACH), patience=9), script, steps=6, resume=True)
    assert (result.step, result.stopped_by) == (6, None)
    assert logged(result) == logged(result, "eval/loss") == [1, 2, 3, 4, 5, 6]
    for log in scalars_of(tmp_path):
        assert sorted(step for step, name in log if name == "train/loss") == [1, 2, 3, 4, 5, 6]
