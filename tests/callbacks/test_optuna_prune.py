"""`OptunaPrune`: what a trial is told, and what becomes of one that is to be pruned."""

import builtins

import pytest

import trainkit as tk
from tests.helpers.infos import make_info
from tests.helpers.runs import TEN, Script, dies_at, saving
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import OptunaPrune

EVERY = tk.Every(steps=2)


class Trial:
    """Is to be pruned once a value is above 5."""

    def __init__(self):
        self.reported = []

    def report(self, value, step):
        assert (type(value), type(step)) == (float, int)
        self.reported.append((step, value))

    def should_prune(self):
        return any(value > 5 for _, value in self.reported)


def test_reports_each_evaluation_until_the_trial_is_to_be_pruned():
    trial, script = Trial(), Script({2: 3.0, 4: 6.0, 6: 1.0})
    pruning = OptunaPrune(trial, "eval/loss")
    one = trainer(script, pruning)
    result = one.fit(TEN, epochs=1, eval_data=script.data, eval_every=EVERY)
    assert trial.reported == [(2, 3.0), (4, 6.0)]
    assert (result.step, result.stopped_by) == (4, "pruned: eval/loss is 6 at step 4")
    assert pruning.pruned == result.stopped_by


def test_training_metrics_are_reported_at_the_end_of_passes():
    trial = Trial()
    pruning = OptunaPrune(trial, "train/loss")
    result = trainer(pruning).fit(numbers(1, 2, 3), epochs=2)
    assert trial.reported == [(3, 2.0), (6, 2.0)]
    assert (result.stopped_by, pruning.pruned) == (None, None)
    pruning.raise_if_pruned()


def test_what_a_killed_run_does_again_is_reported_once_and_a_pruned_one_stays_pruned(tmp_path):
    trial = Trial()
    script = Script({2: 1.0, 4: 2.0, 6: 3.0, 8: 9.0})

    def run(*others):
        pruning = OptunaPrune(trial, "eval/loss")
        one = saving(tmp_path, script, pruning, *others, every=tk.Every(steps=4))
        try:
            return pruning, one.fit(TEN, epochs=1, eval_data=script.data, eval_every=EVERY, resume=True)
        except ConnectionError:
            return pruning, None

    run(dies_at(5))
    assert trial.reported == [(2, 1.0), (4, 2.0)]
    for _ in range(2):  # and the second time the run is over, and pruned all the same
        pruning, result = run()
        assert trial.reported == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 9.0)]
        assert pruning.pruned == result.stopped_by == "pruned: eval/loss is 9 at step 8"


def test_a_further_fit_is_not_pruned_until_it_is():
    trial, script = Trial(), Script({2: 6.0, 4: 6.0})
    pruning = OptunaPrune(trial, "eval/loss")
    one = trainer(script, pruning)
    one.fit(TEN, steps=2, eval_data=script.data, eval_every=EVERY)
    assert pruning.pruned is not None
    trial.reported.clear()
    script.losses[3] = 1.0
    one.fit(TEN, steps=1, eval_data=script.data, eval_every=tk.Every(steps=3))
    assert pruning.pruned is None


def test_without_optuna_it_says_what_to_install(monkeypatch):
    pruning = OptunaPrune(Trial(), "eval/loss")
    pruning.on_fit_start(make_info())
    assert pruning.on_eval_end(make_info(10, {"eval/loss": 9.0})) == tk.Stop(
        "pruned: eval/loss is 9 at step 10"
    )
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pruned: .*pip install 'trainkit\[search\]'"):
        pruning.raise_if_pruned()


def test_a_study_of_optuna_prunes():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=5.0))
    losses = [{2: 3.0, 4: 2.0}, {2: 3.0, 4: 6.0}, {2: 7.0, 4: 1.0}]

    def objective(trial):
        script = Script(losses[trial.number])
        pruning = OptunaPrune(trial, "eval/loss")
        result = trainer(script, pruning).fit(TEN, steps=4, eval_data=script.data, eval_every=EVERY)
        pruning.raise_if_pruned()
        return result.metrics["eval/loss"].last

    study.optimize(objective, n_trials=3)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [trial.intermediate_values for trial in study.trials] == [
        {2: 3.0, 4: 2.0},
        {2: 3.0, 4: 6.0},
        {2: 7.0},
    ]


@pytest.mark.parametrize("trial", [None, object(), "trial"], ids=["none", "object", "str"])
def test_something_that_is_no_trial_is_refused(trial):
    with pytest.raises(TypeError, match=r"report\(value, step\) and should_prune\(\), and report and should"):
        OptunaPrune(trial, "eval/loss")


def test_names_that_are_not_there():
    with pytest.raises(TypeError, match="full name of a metric"):
        OptunaPrune(Trial(), 3)
    with pytest.raises(ValueError, match="begin with one of: eval/, train/"):
        OptunaPrune(Trial(), "loss").on_fit_start(make_info())
    pruning = OptunaPrune(Trial(), "eval/los")
    pruning.on_fit_start(make_info())
    with pytest.raises(ValueError, match="the names are: eval/loss"):
        pruning.on_eval_end(make_info(10, {"eval/loss": 1.0}))
