"""What a step is told to take in memory before XLA starts, and what follows from it for the allocator."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._core.jaxprs import peak_bytes
from trainkit._engine.cpu_settings import step_bytes

ROOT = __file__.rsplit("/", 3)[0]
KIB = 1024
ROW = jax.ShapeDtypeStruct((KIB // 4,), jnp.float32)


def peak(fn, *args):
    return peak_bytes(jax.make_jaxpr(fn)(*args).jaxpr)


def test_values_are_alive_from_their_maker_to_their_last_reader():
    # Arguments and results are left out: of three values in a row two are alive at once, of a chain only two ever.
    assert peak(lambda x: x + 1, ROW) == KIB
    assert peak(lambda x: jnp.sin(x) + 1, ROW) == 2 * KIB
    assert peak(lambda x: jnp.sin(jnp.sin(jnp.sin(jnp.sin(x)))), ROW) == 2 * KIB

    def kept_for_later(x):
        first, second = jnp.sin(x), jnp.cos(x)
        return first * jnp.tan(second)

    assert peak(kept_for_later, ROW) == 3 * KIB


def test_what_is_inside_of_a_loop_counts():
    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.outer(y, y).sum(0), x)

    assert peak(looped, ROW) >= (KIB // 4) ** 2 * 4


class Deep(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.layers):
            x = nn.tanh(nn.Dense(64)(x))
        return nn.Dense(4)(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_activations_that_wait_for_the_way_back_are_told_within_a_factor_of_what_xla_plans(accumulate):
    (batch,) = batches(1, rows=512)
    found = {}
    for layers in (4, 16):
        trainer = NetTrainer(Deep(layers), optax.sgd(0.1), accumulate=accumulate)
        told = step_bytes(trainer._engine.steps, batch)
        state = trainer.init(batch)
        plan = trainer._engine.steps.trace(state, batch).lower().compile().memory_analysis()
        assert 0.5 < told / plan.temp_size_in_bytes < 2.5
        found[layers] = told
    assert 3 < found[16] / found[4] < 5


def test_looking_starts_no_device_and_traces_the_loss_once():
    code = """
import numpy as np, optax
from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._engine import cpu_settings
traced = []
class Counting(NetTrainer):
    def loss(self, model, batch, ctx):
        traced.append(ctx.train)
        return super().loss(model, batch, ctx)
(batch,) = batches(1)
trainer = Counting(Net(), optax.sgd(0.1))
assert cpu_settings.step_bytes(trainer._engine.steps, batch) > 0
assert not cpu_settings.has_started()
trainer.fit([batch], steps=3)
assert cpu_settings.has_started()
assert len(traced) == 3, traced  # to initialise, once more for the stream "dropout", and the step
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


SETTINGS = """
import sys
import numpy as np, optax, trainkit as tk
from flax import linen as nn
from trainkit._engine import cpu_settings
settings = []
cpu_settings._set = lambda parameter, value: settings.append(parameter) or True
cpu_settings.platform.libc_ver = lambda: ("glibc", "2.36")
class Regression(tk.Trainer):
    def loss(self, model, batch, ctx):
        return ((model(batch) - batch) ** 2).mean(-1), {}
how, rows = sys.argv[1], int(sys.argv[2])
batch = np.ones((rows, 1024), np.float32)
trainer = Regression(nn.Dense(1024), optax.sgd(0.1))
match how:
    case "init": trainer.init(batch)
    case "fit": trainer.fit(tk.data.Arrays(batch, rows), epochs=1)
    case "generator": trainer.fit(iter([batch]), epochs=1)
    case "late":
        import jax
        jax.devices()
        trainer.init(batch)
print(*settings)
print(trainer.summary().splitlines()[-1].split(maxsplit=1)[1])
"""
THRESHOLDS = "-3 -1"


@pytest.mark.parametrize(
    ("how", "rows", "settings"),
    [
        ("init", 8, THRESHOLDS),
        ("init", 8192, f"{THRESHOLDS} -8"),
        ("fit", 8192, f"{THRESHOLDS} -8"),
        # One pass is all there is to it: nobody looks before XLA has started.
        ("generator", 8192, THRESHOLDS),
        ("late", 8192, THRESHOLDS),
    ],
)
def test_one_arena_where_a_step_takes_blocks_that_no_other_holds(how, rows, settings):
    ran = subprocess.run(
        [sys.executable, "-c", SETTINGS, how, str(rows)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    told = "keeps freed memory, in one arena" if "-8" in settings else "keeps freed memory"
    assert ran.stdout.splitlines() == [settings, told]


def test_a_loss_that_cannot_be_traced_is_told_where_it_is_used():
    class Wrong(NetTrainer):
        def loss(self, model, batch, ctx):
            raise KeyError("no such leaf")

    with pytest.raises(KeyError, match="no such leaf"):
        Wrong(Net(), optax.sgd(0.1)).fit(tk.data.Arrays(batches(1)[0], 16), epochs=1)
    with pytest.raises(KeyError, match="x"):  # a leaf of strings stays on the host
        NetTrainer(Net(), optax.sgd(0.1)).init({"x": np.array(["a"]), "y": np.zeros(1, np.int32)})
