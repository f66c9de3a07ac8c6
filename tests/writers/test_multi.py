"""The fan-out: a failing writer is told once and left out, and the others go on."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.writer_calls import CALLS, Recorder
from trainkit.writers import MultiWriter, NullWriter


def recorders(*args):
    made = [Recorder(), Recorder(), Recorder()]
    multi = MultiWriter(*made)
    for recorder in made:
        recorder.calls.clear()
    made[1].fails, made[1].error = args
    return multi, made


@pytest.mark.parametrize("method", [*CALLS, "close"])
def test_a_failing_writer_is_named_and_left_out(method):
    multi, (first, failing, last) = recorders(method, OSError("disk full"))
    call = CALLS.get(method, lambda writer: writer.close())
    with pytest.warns(UserWarning, match=rf"Recorder\.{method} failed with OSError: disk full"):
        call(multi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multi.write_scalars(2, {"x": 1.0})
        multi.close()
    assert first.scalars[-1] == last.scalars[-1] == (2, {"x": 1.0})
    assert failing.scalars == []
    assert first.calls[-1] == last.calls[-1] == failing.calls[-1] == "close"


def test_the_others_have_the_values_where_warnings_are_errors():
    multi, (first, _, last) = recorders("write_scalars", OSError("disk full"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="disk full"):
            multi.write_scalars(1, {"x": 1.0})
    assert first.scalars == last.scalars == [(1, {"x": 1.0})]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through(error):
    multi, (first, _, last) = recorders("write_scalars", error())
    with pytest.raises(error):
        multi.write_scalars(1, {"x": 1.0})
    multi, (first, _, last) = recorders("close", error())
    with pytest.raises(error):
        multi.close()
    assert first.calls[-1] == last.calls[-1] == "close"


def test_a_kind_that_a_writer_does_not_do_is_told_once_and_the_writer_stays():
    multi, (_, refusing, _) = recorders("write_images", NotImplementedError("no images"))
    with pytest.warns(UserWarning, match=r"Recorder.write_images is not supported and left out: no images"):
        CALLS["write_images"](multi)
    CALLS["write_images"](multi)
    multi.write_scalars(1, {"x": 1.0})
    assert refusing.scalars == [(1, {"x": 1.0})]


def test_arrays_are_fetched_once_for_all():
    writer = Recorder()
    MultiWriter(writer).write_scalars(1, {"x": jnp.float32(0.5), "y": 2})
    ((_, scalars),) = writer.scalars
    assert type(scalars["x"]) is np.ndarray
    assert scalars == {"x": 0.5, "y": 2}


def test_a_donated_array_is_the_callers_error_and_costs_no_writer():
    writer = Recorder()
    multi = MultiWriter(writer)
    gone = jnp.ones(())
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        multi.write_scalars(1, {"x": gone})
    multi.write_scalars(2, {"x": 1.0, "key": jax.random.key(0)})
    assert [step for step, _ in writer.scalars] == [2]


@pytest.mark.parametrize("wrong", [None, [NullWriter()], "runs"])
def test_what_is_no_writer_is_refused(wrong):
    with pytest.raises(TypeError, match=r"lacks close, flush, write_audios"):
        MultiWriter(wrong)
