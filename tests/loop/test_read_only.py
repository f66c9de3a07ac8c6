"""What a hook is shown can't be changed through it; a count that can't go on is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import trainkit as tk
from tests.helpers.weight import numbers, trainer


class Meddles(tk.callbacks.Callback):
    """Tries to change what it is shown, and notes what refused it."""

    def __init__(self):
        self.refused = []

    def on_eval_end(self, info):
        for change in (
            lambda: info.metrics.update({"eval/loss": 0.0}),
            lambda: info.metrics.__setitem__("eval/loss", 0.0),
            lambda: info.history.append(info.step, {"eval/loss": 0.0}),
            lambda: info.history.load_state_dict({}),
        ):
            try:
                change()
            except (AttributeError, TypeError) as error:
                self.refused.append(type(error).__name__)
        info.history["eval/loss"].clear() if "eval/loss" in info.history else None


class Looks(tk.callbacks.Callback):
    def __init__(self):
        self.seen = []

    def on_eval_end(self, info):
        self.seen.append(info.metrics["eval/loss"])


def test_an_evaluation_is_the_same_for_every_callback():
    meddles, looks = Meddles(), Looks()
    made = trainer(meddles, looks)
    result = made.fit(numbers(1, 2), epochs=2, eval_data=numbers(3))
    assert looks.seen == [3.0, 3.0]
    assert result.history["eval/loss"] == [(2, 3.0), (4, 3.0)]
    assert meddles.refused == ["AttributeError"] * 8


def test_the_history_shown_grows_as_the_run_does():
    lengths = []
    look = tk.callbacks.Lambda(
        on_eval_end=lambda info: lengths.append(len(info.history.get("eval/loss", ())))
    )
    trainer(look).fit(numbers(1), epochs=3, eval_data=numbers(3))
    assert lengths[-1] >= 2


@pytest.mark.parametrize("options", [{"steps": 10}, {"epochs": 5}], ids=repr)
def test_the_step_is_refused_before_it_wraps(options):
    made = trainer()
    made.state = made.state.replace(step=jnp.asarray(2**31 - 4, jnp.int32))
    with pytest.raises(OverflowError, match=r"state\.step is 2147483647, the largest int32"):
        made.fit(numbers(1, 2), **options)
    assert int(np.asarray(made.state.step)) == 2**31 - 1
    with pytest.raises(OverflowError, match="largest int32"):
        made.fit(numbers(1, 2), steps=1)
