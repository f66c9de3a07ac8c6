"""Checkpoints of weights alone: what is in them, what they are good for, and what they refuse."""

import jax
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.runs import steps_in
from trainkit.callbacks import EMA, Checkpoint, EvalView, Lambda
from trainkit.testing._classifier import Net, NetTrainer, examples

DATA = [examples(8, seed) for seed in range(3)]
TWO = tk.Every(steps=2)


def made(*callbacks, logdir=None, model=None, tx=None):
    return NetTrainer(model or Net(norm=True), tx or optax.adam(1e-2), callbacks=callbacks, logdir=logdir)


def weights(folder=None, **options):
    return Checkpoint(options.pop("every", TWO), weights_only=True, folder=folder, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saved weights, with its result and what it evaluates to."""
    logdir = tmp_path_factory.mktemp("weights")
    trainer = made(EMA(0.9), weights(), logdir=logdir)
    result = trainer.fit(DATA, steps=6, eval_data=DATA)
    return logdir, result, {name: trainer.evaluate(DATA, weights=name) for name in ("averaged", "live")}


def test_they_hold_the_model_and_what_evaluations_read(run):
    logdir, _, _ = run
    names = {name.split("/")[0] for name in _saved(logdir)}
    assert names == {"step", "rng", "params", "batch_stats", "hooks"}
    assert not any(name.endswith("count") for name in _saved(logdir))  # without debias nothing reads it
    assert [info.weights_only for info in tk.checkpoint.verify(logdir)] == [True, True, True]
    assert [info.problems for info in tk.checkpoint.verify(logdir)] == [()] * 3


def _saved(logdir):
    import json

    return json.loads((logdir / "checkpoints" / "6" / "meta.json").read_text())["arrays"]


@pytest.mark.parametrize("started", [False, True])
def test_they_are_evaluated_as_the_run_was(run, started):
    logdir, result, scores = run
    trainer = made(EMA(0.9))
    if started:
        trainer.init(DATA[0])
    restored = trainer.restore(logdir)
    assert (restored.step, restored.left) == (6, ())
    assert {name: trainer.evaluate(DATA, weights=name) for name in scores} == scores
    assert_same(trainer.state.params, result.state.params)
    assert_same(trainer.state.batch_stats, result.state.batch_stats)
    # The optimizer begins afresh, as one of a fresh state does.
    assert_same(trainer.state.opt_state, optax.adam(1e-2).init(result.state.params))
    assert trainer.fit(DATA, steps=2).step == 8


def test_a_trainer_without_the_average_takes_the_live_weights(run, caplog):
    logdir, _, scores = run
    trainer = made()
    assert any("hooks/ema" in line for line in trainer.restore(logdir).left)
    assert "no callback of this trainer has" in caplog.text
    assert trainer.evaluate(DATA) == scores["live"]


def test_in_part(run):
    logdir, result, _ = run
    trainer = made(EMA(0.9))
    trainer.init(DATA[0])
    trainer.restore(logdir, partial="params/Dense_0")
    assert_same(trainer.state.params["Dense_0"], result.state.params["Dense_0"])
    assert int(trainer.state.step) == 0


def test_another_model_is_refused(run):
    trainer = made(EMA(0.9), model=Net(norm=False))
    trainer.init(DATA[0])
    with pytest.raises(ValueError, match=r"of another model.*batch_stats/BatchNorm_0/mean"):
        trainer.restore(run[0])


def test_no_run_is_resumed_from_them(run):
    with pytest.raises(
        ValueError, match=r"resume=True needs checkpoints.*weights_only=True can't be resumed"
    ):
        made(weights(), logdir=run[0]).fit(DATA, steps=6, resume=True)
    other = made(EMA(0.9), Checkpoint(TWO), logdir=run[0])
    with pytest.raises(ValueError, match=r"of step 6, holds weights only.*trainer\.restore\(path\)"):
        other.fit(DATA, steps=6, resume=True)


def test_beside_whole_ones_the_run_goes_on_from_those(tmp_path):
    def dies(info):
        if info.step == 6:
            raise ConnectionError

    def fit(name, *extra):
        keepers = [Checkpoint(tk.Every(steps=3)), weights(tmp_path / name / "best", keep=None)]
        trainer = made(EMA(0.9), *keepers, *extra, logdir=tmp_path / name)
        return trainer.fit(DATA, steps=8, resume=True)

    with pytest.raises(ConnectionError):
        fit("a", Lambda(on_step=dies))
    assert steps_in(tmp_path / "a" / "best") == [2, 4]
    resumed, whole = fit("a"), fit("b")
    assert steps_in(tmp_path / "a" / "best") == steps_in(tmp_path / "b" / "best") == [2, 4, 6, 8]
    assert_same(resumed.state.params, whole.state.params)
    # Another run does not take them for its own.
    fresh = made(EMA(0.9), weights(tmp_path / "a" / "best"), logdir=tmp_path / "c")
    with pytest.raises(ValueError, match="holds a run already"):
        fresh.fit(DATA, steps=8)


def test_a_view_of_the_optimizer_is_kept_whole(tmp_path):
    def schedule_free(state):
        params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
        return state.replace(params=params)

    def trainer(*callbacks, **options):
        tx = optax.contrib.schedule_free_sgd(0.1)
        return made(EvalView(schedule_free), *callbacks, model=Net(norm=False), tx=tx, **options)

    first = trainer(weights(), logdir=tmp_path)
    first.fit(DATA, steps=4)
    second = trainer()
    second.restore(tmp_path)
    assert second.evaluate(DATA) == first.evaluate(DATA) != first.evaluate(DATA, weights="live")


def test_nothing_is_rolled_back_to_them(tmp_path):
    asks = Lambda(on_step=lambda info: tk.callbacks.Rollback("asked") if info.step == 3 else None)
    trainer = made(asks, weights(), model=Net(norm=False), logdir=tmp_path)
    with pytest.raises(RuntimeError, match="asked; there is no checkpoint to go back to"):
        trainer.fit(DATA, steps=4)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        kernel = self.param("k", nn.with_partitioning(nn.initializers.ones, (None, None)), (x.shape[-1], 3))
        return x @ kernel


def test_boxed_parameters_go_into_the_boxes_of_a_state(tmp_path):
    first = made(weights(), model=Boxed(), logdir=tmp_path)
    state = first.fit(DATA, steps=2).state
    second = made(model=Boxed())
    with pytest.raises(ValueError, match=r"not plain dicts.*trainer\.init\(batch\) first"):
        second.restore(tmp_path)
    second.init(DATA[0])
    second.restore(tmp_path)
    assert_same(second.state.params, state.params)
    assert jax.tree.structure(second.state.opt_state) == jax.tree.structure(state.opt_state)
