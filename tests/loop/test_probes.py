"""Probes: computed in the steps where they are due and in no others, by one more program, and told with the step."""

import jax
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.by_hand import hand_step, start
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from tests.helpers.weight import Weight as One
from tests.helpers.weight import WeightTrainer, numbers
from trainkit._core.state import with_raw_key
from trainkit.data._source import as_source

DATA = batches(5)


class Seen(tk.callbacks.Callback):
    """Keeps what its probe, the loss and the sum of the batch, gave at each step it was called after."""

    def __init__(self, every, name="seen"):
        self.every, self.name, self.values, self.bare = every, name, [], []

    def step_probe(self):
        return tk.hooks.StepProbe(self.name, lambda values: (values.loss, values.state.step))

    def on_step(self, info):
        self.values.append((info.step, *map(np.asarray, info.probed)))

    def on_eval_end(self, info):
        self.bare.append(info.probed)

    @property
    def steps(self):
        assert all(step == at for step, _, at in self.values)
        return [step for step, _, _ in self.values]


def train(*callbacks, data=DATA, tx=None, fit=None, **options):
    trainer = NetTrainer(Net(), tx or optax.sgd(0.1), callbacks=callbacks, **options)
    return trainer, trainer.fit(data, **(fit or {"epochs": 3}))


def compiled(trainer):
    counts = trainer._engine.steps.traces.count
    return counts("training"), counts("probed training")


@pytest.fixture(scope="module")
def losses():
    """The losses of the loop by hand, by step."""
    state, found = start(Net(), optax.sgd(0.1), DATA[0]), {}
    for step in range(1, 16):
        state, loss = hand_step(state, DATA[(step - 1) % 5])
        found[step] = float(loss)
    return found


@pytest.fixture(scope="module")
def plain():
    return jax.device_get(train()[1].state)


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_several_probes_are_one_more_program_and_leave_the_run_as_it_is(losses, plain, steps_per_call):
    seen = Seen(tk.Every(steps=4)), Seen(tk.At(steps=(6, 12)), "other")
    trainer, result = train(*seen, steps_per_call=steps_per_call, fit={"epochs": 3, "eval_data": DATA[:1]})
    assert [one.steps for one in seen] == [[4, 8, 12], [6, 12]]
    assert seen[0].bare == [None, None, None]
    for step, loss, _ in [*seen[0].values, *seen[1].values]:
        np.testing.assert_allclose(loss, losses[step], rtol=1e-5)
    assert compiled(trainer) == (1, 1)
    assert_same(jax.device_get(result.state.params), plain.params)
    assert_same(jax.device_get(result.state.opt_state), plain.opt_state)


def test_the_step_is_the_very_program_it_was():
    """What other steps cost is no matter of measuring: there is nothing in them."""
    texts = []
    for callbacks in ([], [Seen(tk.Every(steps=4)), tk.callbacks.Watch(), tk.callbacks.GradientNoiseScale()]):
        trainer = NetTrainer(Net(), optax.sgd(0.1), callbacks=callbacks)
        state, engine = trainer.init(DATA[0]), trainer._engine
        prepared = engine.prepare_train(state, as_source(DATA), DATA[0])
        raw = jax.eval_shape(with_raw_key, state)
        held = engine.held((), 0)
        texts.append(prepared.step.lower(raw, prepared.empty, held, DATA[0], None).as_text())
    assert texts[0] == texts[1]


def test_what_is_never_due_is_never_compiled():
    trainer, _ = train(Seen(tk.Never()))
    assert compiled(trainer) == (1, 0)


@pytest.mark.parametrize(
    ("data", "accumulate", "steps"),
    [
        pytest.param(DATA, 1, [10], id="length known"),
        pytest.param(DATA, 2, [6], id="accumulated, with a short tail"),
        # The end of a pass is known when it is over: the step after it is the next that can be told.
        pytest.param(lambda: iter(DATA), 1, [11], id="length unknown"),
    ],
)
def test_a_cadence_in_passes(data, accumulate, steps):
    seen = Seen(tk.Every(epochs=2))
    train(seen, data=data, accumulate=accumulate)
    assert seen.steps == steps


def test_a_cadence_in_passes_of_unknown_length_goes_on_in_a_further_fit():
    seen = Seen(tk.Every(epochs=1))
    trainer, _ = train(seen, data=(data := lambda: iter(DATA)), fit={"epochs": 1})
    trainer.fit(data, epochs=1)
    assert seen.steps == [6]


def test_a_cadence_in_seconds_tells_of_the_step_after():
    seen = Seen(tk.Every(seconds=1e-9))
    train(seen)
    # Due after every step: of one in two it is too late to say so.
    assert seen.steps == [2, 4, 6, 8, 10, 12, 14]


def test_a_dry_run_probes_its_last_step():
    seen = Seen(tk.Every(steps=1000))
    train(seen, dry_run=3)
    assert seen.steps == [3]


def test_held_data_and_a_part_of_a_pass(losses):
    arrays = {name: np.concatenate([one[name] for one in DATA]) for name in DATA[0]}
    seen = Seen(tk.Every(steps=3))
    data = tk.data.Arrays(arrays, batch_size=16)
    trainer, _ = train(seen, data=data, steps_per_call=4, fit={"steps": 7})
    trainer.fit(data, steps=8)
    assert seen.steps == [3, 6, 9, 12, 15]
    np.testing.assert_allclose(
        [loss for _, loss, _ in seen.values], [losses[s] for s in seen.steps], rtol=1e-5
    )


def test_what_a_probe_is_told_of_a_refused_step():
    """State and updates are those that were kept."""
    data = batches(3)
    data[1]["x"][0, 0] = np.nan

    class Kept(Seen):
        def step_probe(self):
            def fn(values):
                norm = optax.tree.norm
                return norm(values.updates), norm(values.grads), values.mask.sum(), values.state.step

            return tk.hooks.StepProbe("kept", fn)

    kept = Kept(tk.Every(steps=1))
    train(kept, tk.callbacks.NanGuard("skip"), data=data, fit={"epochs": 1})
    updates, grads, rows = np.array([found[1:4] for found in kept.values]).T
    assert updates[0] > 0
    assert updates[1] == 0
    assert updates[2] > 0
    assert np.isfinite(grads).tolist() == [True, False, True]
    assert rows.tolist() == [16, 16, 16]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_and_mask(accumulate):
    data = [np.full(4, 1, np.float32), np.full(3, 2, np.float32)]

    class Rows(Seen):
        def step_probe(self):
            def fn(values):
                batch, mask = values.batch, values.mask
                if accumulate == 2:
                    batch, mask = jax.numpy.concatenate(batch), jax.numpy.concatenate(mask)
                return jax.numpy.where(mask, batch, 0).sum(), mask.sum(), values.state.step

            return tk.hooks.StepProbe("rows", fn)

    rows = Rows(tk.Every(steps=1))
    WeightTrainer(One(), optax.sgd(1.0), callbacks=[rows], accumulate=accumulate).fit(data, epochs=1)
    expected = [(4, 4), (6, 3)] if accumulate == 1 else [(10, 7)]
    assert [(float(found[1]), int(found[2])) for found in rows.values] == expected


def test_what_is_wrong_with_a_probe_is_said_before_the_first_step():
    class Words(Seen):
        def step_probe(self):
            return tk.hooks.StepProbe("words", lambda values: {"a": "b"})

    trainer = WeightTrainer(One(), optax.sgd(1.0), callbacks=[Words(tk.Every(steps=100))])
    with pytest.raises(TypeError, match=r"the probe words/a returned str; it must return arrays"):
        trainer.fit(numbers(1, 2), epochs=1)
    assert compiled(trainer) == (0, 0)
    with pytest.raises(ValueError, match="two callbacks have a probe named 'seen'; give one another name="):
        WeightTrainer(One(), optax.sgd(1.0), callbacks=[Seen(tk.Never()), Seen(tk.Never())])


def test_a_step_hook_is_not_told_the_batch():
    hook = tk.hooks.StepHook("rows", lambda state: 0, lambda memory, values: values.batch)

    class Greedy(tk.callbacks.Callback):
        def step_hook(self):
            return hook

    with pytest.raises(AttributeError, match=r"values\.batch is told to probes"):
        WeightTrainer(One(), optax.sgd(1.0), callbacks=[Greedy()]).fit(numbers(1), epochs=1)


def test_after_a_rollback_probes_are_due_as_before(tmp_path):
    data = batches(8)
    data[5]["x"][0, 0] = np.nan
    seen = Seen(tk.Every(steps=2))
    guard = tk.callbacks.NanGuard("rollback", tk.Every(steps=1))
    saving = tk.callbacks.Checkpoint(every=tk.Every(steps=3))
    options = {"logdir": tmp_path, "steps_per_call": 2, "fit": {"epochs": 1}}
    trainer, result = train(seen, guard, saving, data=data, **options)
    # Step 6 is bad: back to step 3, and on with the two batches after it.
    assert (seen.steps, result.step) == ([2, 4, 6, 4], 5)
    assert compiled(trainer) == (1, 1)
