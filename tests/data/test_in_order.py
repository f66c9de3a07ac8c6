"""Evaluation and prediction see every row of a source once and in its order, however it is trained on."""

import numpy as np
import optax
import pytest

from tests.helpers.weight import Weight, WeightTrainer
from trainkit.data import Arrays, as_source

ROWS = 23
VALUES = np.arange(ROWS, dtype=np.float32)


class Values(WeightTrainer):
    def predict_step(self, model, batch, ctx):
        return batch + 0 * model()


def trainer():
    made = Values(Weight(), optax.sgd(1.0))
    made.init(VALUES)
    return made


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, {"shuffle": True, "drop_last": False}, {"drop_last": True}, {}],
    ids=repr,
)
@pytest.mark.parametrize("batch_size", [4, 23, 50])
def test_evaluate_and_predict_see_each_row_once_in_order(options, batch_size):
    if batch_size > ROWS and options.get("drop_last", options.get("shuffle")):
        pytest.skip("refused where it is made")
    made, data = trainer(), Arrays(VALUES, batch_size, **options)
    assert made.evaluate(data)["loss"] == pytest.approx(VALUES.mean(), rel=1e-6)
    np.testing.assert_array_equal(made.predict(data), VALUES)


def test_eval_data_of_a_fit_are_seen_whole():
    made = trainer()
    data = Arrays(VALUES, 4, shuffle=True)
    result = made.fit([np.zeros(4, np.float32)], epochs=1, eval_data={"all": data})
    assert result.history["all/loss"] == [(1, pytest.approx(VALUES.mean(), rel=1e-6))]


def test_the_order_of_training_is_not_touched():
    data = Arrays(VALUES, 4, shuffle=True, seed=5)
    before = [batch.tolist() for batch in data.batches(0)]
    ordered = data.in_order()
    assert [row for batch in ordered.batches(3) for row in batch] == VALUES.tolist()
    assert [batch.tolist() for batch in data.batches(0)] == before
    assert (ordered.num_examples, ordered.steps_per_epoch, ordered.may_be_partial) == (23, 6, True)
    assert (data.num_examples, data.steps_per_epoch, data.may_be_partial) == (20, 5, False)
    assert ordered.in_order() is ordered


def test_other_sources_are_evaluated_as_they_come():
    source = as_source([VALUES[:4], VALUES[4:6]])
    assert source.in_order() is source


def test_a_subclass_keeps_what_it_adds():
    seen = []

    class Seen(Arrays):
        def batches(self, epoch, start=0):
            seen.append(epoch)
            return super().batches(epoch, start)

    made = trainer()
    assert made.evaluate(Seen(VALUES, 4, shuffle=True))["loss"] == pytest.approx(VALUES.mean(), rel=1e-6)
    assert seen == [0]
