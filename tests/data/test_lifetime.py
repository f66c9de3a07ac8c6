"""A batch belongs to its source until the next is asked for: one that reuses its buffers trains as one that copies."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.weight import WeightTrainer
from trainkit.data import Arrays, Source, as_source, prefetch

ROWS, WIDTH, BATCHES = 4, 8, 7


def aligned(shape, offset=0):
    """An array at a multiple of 64 bytes, which JAX takes as it is on a CPU; of others at `offset` beyond it."""
    count = int(np.prod(shape)) * 4
    memory = np.empty(count + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + count].view(np.float32).reshape(shape)


class Reuses:
    """A loader that fills one buffer with batch after batch, and one dict."""

    def __init__(self, batches, offset=0):
        self.batches, self.buffer = batches, aligned(batches[0].shape, offset)
        self.batch = {"x": self.buffer}

    def __iter__(self):
        for batch in self.batches:
            self.buffer[...] = batch
            yield self.batch
        self.buffer[...] = np.nan


def numbers(rows=ROWS, width=WIDTH):
    return list(np.random.default_rng(0).normal(size=(BATCHES, rows, width)).astype(np.float32))


class Linear(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch["x"]) - 1) ** 2).mean(axis=-1), {"x": batch["x"].mean(axis=-1)}


def linear(**options):
    return Linear(nn.Dense(2), optax.adam(0.1), **options)


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize(
    "options",
    [{"steps_per_call": 1}, {"steps_per_call": 3}, {}, {"accumulate": 3}],
    ids=repr,
)
def test_a_loader_that_reuses_its_buffer_trains_as_one_that_does_not(options, offset):
    expected = linear(**options).fit([{"x": batch} for batch in numbers()], epochs=3)
    result = linear(**options).fit(Reuses(numbers(), offset), epochs=3)
    for one, other in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(expected.state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert result.history["train/loss"] == expected.history["train/loss"]


@pytest.mark.parametrize("offset", [0, 16])
def test_large_buffers_that_jax_reads_while_python_goes_on_are_copied(offset):
    # 16 MiB: JAX copies those that lie askew in a thread of its own.
    sizes = list(range(1, 6))
    batches = [np.full((4, 2**20), size, np.float32) for size in sizes]

    class Mean(WeightTrainer):
        def loss(self, model, batch, ctx):
            return super().loss(model, batch["x"].mean(axis=-1), ctx)

    from tests.helpers.weight import Weight

    result = Mean(Weight(), optax.sgd(1.0), steps_per_call=1).fit(Reuses(batches, offset), epochs=1)
    assert float(result.state.params["w"]) == pytest.approx(-sum(sizes), rel=1e-6)


@pytest.mark.parametrize("offset", [0, 16])
def test_an_evaluation_and_a_prediction_see_what_the_buffer_held(offset):
    trainer, batches = linear(), numbers()
    trainer.init({"x": batches[0]})
    expected = trainer.evaluate([{"x": batch} for batch in batches])
    assert trainer.evaluate(Reuses(batches, offset)) == expected
    predicted = trainer.predict(Reuses(batches, offset))["x"]
    np.testing.assert_allclose(predicted, np.concatenate(batches).mean(axis=-1), rtol=1e-5)


def test_prefetched_batches_stay_as_they_were():
    with prefetch(iter(Reuses(numbers())), size=3) as ahead:
        seen = [batch["x"] for batch in ahead]
    np.testing.assert_array_equal(seen, numbers())


class OwnSource(Source):
    """Reuses its buffer, as a `Source` may."""

    steps_per_epoch, batch_size, may_be_partial, seekable = BATCHES, ROWS, False, True

    def __init__(self):
        self.buffer = np.zeros((ROWS, WIDTH), np.float32)

    def batches(self, epoch, start=0):
        self.check_position(epoch, start)
        return self._batches(start)

    def _batches(self, start):
        for batch in numbers()[start:]:
            self.buffer[...] = batch
            yield {"x": self.buffer}


def test_a_source_of_ones_own_may_reuse_its_buffers():
    expected = linear(steps_per_call=3).fit([{"x": batch} for batch in numbers()], epochs=2)
    result = linear(steps_per_call=3).fit(OwnSource(), epochs=2)
    np.testing.assert_array_equal(result.state.params["kernel"], expected.state.params["kernel"])


def test_what_a_source_hands_out_for_keeps_is_not_copied():
    arrays = Arrays({"x": np.zeros((8, 2), np.float32)}, 4)
    (first, _) = arrays.kept_batches(0)
    assert np.shares_memory(first["x"], arrays.tree["x"])
    listed = [np.zeros((4, 2), np.float32)]
    assert next(as_source(listed).kept_batches(0)) is listed[0]


@pytest.mark.parametrize("make", [OwnSource, lambda: Reuses(numbers())], ids=["source", "iterable"])
def test_check_source_finds_sources_that_reuse_their_buffers(make):
    with pytest.raises(AssertionError, match="a batch stays as it is once the next is asked for: batch 0"):
        tk.testing.check_source(make)


def test_check_source_takes_them_where_it_is_told_to():
    class Lone(OwnSource):
        def _batches(self, start):
            buffer = np.zeros((ROWS, WIDTH), np.float32)
            for batch in numbers()[start:]:
                buffer[...] = batch
                yield {"x": buffer}

    tk.testing.check_source(Lone, may_reuse=True)
    with pytest.raises(AssertionError, match="batch 0 of epoch 0 was written over"):
        tk.testing.check_source(type("Keeps", (Lone,), {"keeps_batches": True}), may_reuse=True)
