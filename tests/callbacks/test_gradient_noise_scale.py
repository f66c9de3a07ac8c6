"""`GradientNoiseScale` on problems whose noise scale is known, and its estimates against NumPy."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from trainkit.callbacks import GradientNoiseScale

EACH = tk.Every(steps=1)
FROZEN = optax.sgd(0.0)


class Point(nn.Module):
    """A point, at 0."""

    @nn.compact
    def __call__(self):
        return self.param("w", nn.initializers.zeros, (4,))


class Mean(tk.Trainer):
    """Estimates a mean: the gradient of an example is the point less the example."""

    def loss(self, model, batch, ctx):
        return ((model()[None] - batch) ** 2).sum(axis=-1) / 2, {}


class WeightedMean(Mean):
    def loss(self, model, batch, ctx):
        losses = ((model()[None] - batch) ** 2).sum(axis=-1) / 2
        return tk.Weighted(losses, jnp.ones_like(losses)), {}


class ScalarMean(Mean):
    def loss(self, model, batch, ctx):
        return super().loss(model, batch, ctx)[0].mean(), {}


STDS, CENTRE = np.array([0.5, 1.0, 1.5, 2.0]), np.array([0.5, -0.5, 0.5, 0.5])
KNOWN = (STDS**2).sum() / (CENTRE**2).sum()


def draws(steps, rows, seed=0):
    rng = np.random.default_rng(seed)
    return [(CENTRE + STDS * rng.normal(size=(rows, 4))).astype(np.float32) for _ in range(steps)]


def estimates(pieces):
    """Returns the unbiased estimates of |G|^2 and the trace from pieces `[b, 4]` of one size, as in appendix A.1."""
    b, whole = len(pieces[0]), np.concatenate(pieces)
    small = np.mean([(piece.mean(axis=0) ** 2).sum() for piece in pieces])
    large = (whole.mean(axis=0) ** 2).sum()
    big = len(whole)
    return (big * large - b * small) / (big - b), (small - large) / (1 / b - 1 / big)


def smoothed(found, decay):
    """Returns the quotient of the averages after each estimate, those that are written."""
    square = noise = 0.0
    for one, other in found:
        square, noise = decay * square + (1 - decay) * one, decay * noise + (1 - decay) * other
        yield noise / square


def values(result):
    return [value for _, value in result.history["gradient_noise_scale"]]


@pytest.mark.parametrize("kind", [Mean, WeightedMean])
def test_halves_of_the_batch(kind):
    data = draws(6, 64)
    result = kind(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH, decay=0.9)]).fit(data, epochs=1)
    expected = smoothed([estimates(np.split(batch, 2)) for batch in data], 0.9)
    np.testing.assert_allclose(values(result), list(expected), rtol=1e-3)


@pytest.mark.parametrize("kind", [Mean, WeightedMean, ScalarMean])
def test_accumulated_batches(kind):
    data = draws(12, 16)
    trainer = kind(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH, decay=0.5)], accumulate=4)
    expected = smoothed([estimates(data[i : i + 4]) for i in range(0, 12, 4)], 0.5)
    np.testing.assert_allclose(values(trainer.fit(data, epochs=1)), list(expected), rtol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_known_noise_scale(accumulate):
    trainer = Mean(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH)], accumulate=accumulate)
    result = trainer.fit(draws(400 * accumulate, 32 // accumulate), epochs=1)
    np.testing.assert_allclose(values(result)[-1], KNOWN, rtol=0.15)


class Linear(tk.Trainer):
    def loss(self, model, batch, ctx):
        return (model(batch["x"])[:, 0] - batch["y"]) ** 2 / 2, {}


def test_linear_regression():
    """At w = 0 the gradient of an example is -y x, with y = a x + e: both follow from a sum over many."""
    rng = np.random.default_rng(1)

    def batch(rows):
        x = rng.normal(size=(rows, 3)).astype(np.float32)
        return {"x": x, "y": (x @ [1.0, -1.0, 0.5] + 0.5 * rng.normal(size=rows)).astype(np.float32)}

    many = batch(200_000)
    grads = -many["y"][:, None] * many["x"]
    known = grads.var(axis=0).sum() / (grads.mean(axis=0) ** 2).sum()
    model = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)
    trainer = Linear(model, FROZEN, callbacks=[GradientNoiseScale(EACH)])
    result = trainer.fit([batch(64) for _ in range(300)], epochs=1)
    np.testing.assert_allclose(values(result)[-1], known, rtol=0.15)


def test_padding_and_pieces_of_unequal_size():
    """Of 3 real rows among 8 one is alone in the second half; a piece without rows counts for nothing."""
    (full,), (part,) = draws(1, 8), draws(1, 3, seed=1)

    def of(first, second):
        whole = np.concatenate([first, second])
        sizes, square = np.array([len(first), len(second)]), lambda rows: (rows.mean(axis=0) ** 2).sum()
        small, fine = np.mean([square(first), square(second)]), (1 / sizes).mean()
        noise = (small - square(whole)) / (fine - 1 / len(whole))
        return square(whole) - noise / len(whole), noise

    trainer = Mean(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH, decay=0.5)])
    found = values(trainer.fit([full, part], epochs=1))
    expected = list(smoothed([of(full[:4], full[4:]), of(part[:2], part[2:])], 0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    grouped = Mean(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH, decay=0.5)], accumulate=2)
    # The second step has one batch alone: nothing to compare, and the estimate stays.
    found = values(grouped.fit([full, part, full], epochs=1))
    np.testing.assert_allclose(found, [smoothed_one(of(full, part))] * 2, rtol=1e-3)


def smoothed_one(found):
    return found[1] / found[0]


def test_only_noise_writes_nothing():
    data = [np.concatenate([rows, -rows]) for rows in draws(5, 16)]
    result = Mean(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH)]).fit(data, epochs=1)
    assert "gradient_noise_scale" not in result.history


def test_what_is_remembered_goes_on():
    data = draws(8, 16)
    whole = Mean(Point(), FROZEN, callbacks=[GradientNoiseScale(EACH)]).fit(data, epochs=1)
    first = GradientNoiseScale(EACH)
    Mean(Point(), FROZEN, callbacks=[first]).fit(data[:5], epochs=1)
    second = GradientNoiseScale(EACH)
    second.load_state_dict(first.state_dict())
    rest = Mean(Point(), FROZEN, callbacks=[second]).fit(data[5:], epochs=1)
    assert values(rest) == values(whole)[5:]


class Own(Mean):
    def train_step(self, state, batch):
        return super().train_step(state, batch)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"GradientNoiseScale compares .* scalar .* Trainer\(accumulate=2\)"):
        ScalarMean(Point(), FROZEN, callbacks=[GradientNoiseScale()]).fit(draws(2, 4), epochs=1)
    with pytest.raises(ValueError, match=r"GradientNoiseScale needs the gradients .* own train_step"):
        Own(Point(), FROZEN, callbacks=[GradientNoiseScale()]).fit(draws(2, 4), epochs=1)
    for decay in (1.0, -0.1, "slow"):
        with pytest.raises(ValueError, match=r"decay=.*must be a number in \[0, 1\)"):
            GradientNoiseScale(decay=decay)
    with pytest.raises(TypeError, match="every=50"):
        GradientNoiseScale(50)
