"""`LogMetrics`: what is written, when, and that nothing is looked into too early."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.infos import Lazy, Recorder, make_info
from trainkit._core.cadence import At, Every
from trainkit.callbacks import LogMetrics, Phase


@pytest.fixture
def writer():
    return Recorder()


@pytest.fixture
def log(writer):
    log = LogMetrics()
    log.on_fit_start(make_info(writer=writer))
    return log


def test_writes_one_interval_late_and_looks_no_earlier(log, writer):
    first, second = Lazy({"train/loss": 1.0}), Lazy({"train/loss": 2.0})
    log.on_step(make_info(50, first, epoch=1))
    assert (writer.rows, first.looks) == ([], 0)
    log.on_step(make_info(100, second, epoch=2))
    assert writer.rows == [(50, {"train/loss": 1.0, "epoch": 1.0})]
    assert first.looks > 0
    assert second.looks == 0
    log.on_fit_end(make_info(100))
    assert writer.rows[1:] == [(100, {"train/loss": 2.0, "epoch": 2.0})]


def test_rows_are_in_order_of_steps_before_an_evaluation(log, writer):
    log.on_step(make_info(50, {"train/loss": 1.0}))
    log.on_eval_start(make_info(50))
    log.on_eval_end(make_info(50, {"eval/loss": 3.0, "test/loss": 4.0}))
    log.on_eval_start(make_info(70))
    log.on_eval_end(make_info(70, {"eval/loss": 5.0}))
    log.on_step(make_info(100, {"train/loss": 2.0}))
    log.on_fit_end(make_info(100))
    assert writer.rows == [
        (50, {"train/loss": 1.0, "epoch": 1.0}),
        (50, {"eval/loss": 3.0, "test/loss": 4.0}),
        (70, {"eval/loss": 5.0}),
        (100, {"train/loss": 2.0, "epoch": 1.0}),
    ]


def test_the_end_of_a_fit_writes_the_steps_left_over(log, writer):
    log.on_step(make_info(50, {"train/loss": 1.0}))
    log.on_fit_end(make_info(70, {"train/loss": 9.0}, epoch=2))
    assert writer.rows == [(50, {"train/loss": 1.0, "epoch": 1.0}), (70, {"train/loss": 9.0, "epoch": 2.0})]


def test_no_step_is_written_twice(log, writer):
    log.on_step(make_info(50, {"train/loss": 1.0}))
    log.on_fit_end(make_info(50, {"train/loss": 9.0}))
    log.close()
    log.on_fit_start(make_info(50, writer=writer))
    log.on_fit_end(make_info(50, {"train/loss": 9.0}))
    assert [step for step, _ in writer.rows] == [50]


def test_no_row_where_there_is_no_metric(log, writer):
    log.on_fit_end(make_info(70, {}))
    log.on_eval_end(make_info(70, {}))
    assert writer.rows == []


def test_an_exception_writes_what_is_pending_and_no_part_of_an_interval(log, writer):
    log.on_step(make_info(50, {"train/loss": 1.0}))
    log.on_exception(make_info(60, {"train/loss": 9.0}), KeyboardInterrupt())
    assert writer.rows == [(50, {"train/loss": 1.0, "epoch": 1.0})]


def test_metrics_that_can_not_be_read_raise_once(log, writer):
    class Broken(Lazy):
        def __len__(self):
            raise FloatingPointError

    log.on_step(make_info(50, Broken()))
    with pytest.raises(FloatingPointError):
        log.on_step(make_info(100, {"train/loss": 1.0}))
    log.on_exception(make_info(100), FloatingPointError())
    assert writer.rows == []


def test_a_checkpoint_never_lies_ahead_of_the_log(log, writer):
    log.on_step(make_info(50, {"train/loss": 1.0}))
    assert log.state_dict() == {"last_step": 50}
    assert writer.rows == [(50, {"train/loss": 1.0, "epoch": 1.0})]


def test_a_resumed_fit_with_nothing_left_to_do_writes_what_was_left_over(writer):
    log = LogMetrics()
    log.load_state_dict({"last_step": 50})
    log.on_fit_start(make_info(70, writer=writer))
    log.on_fit_end(make_info(70, {"train/loss": 9.0}))
    assert writer.rows == [(70, {"train/loss": 9.0, "epoch": 1.0})]


def test_another_trainer_begins_afresh(log, writer):
    log.on_step(make_info(500, {"train/loss": 1.0}))
    log.on_fit_end(make_info(500))
    log.close()
    other = Recorder()
    log.on_fit_start(make_info(0, writer=other))
    log.on_fit_end(make_info(20, {"train/loss": 2.0}))
    assert other.rows == [(20, {"train/loss": 2.0, "epoch": 1.0})]
    assert len(writer.rows) == 1


def test_numbers_of_every_kind_become_floats(log, writer):
    log.on_eval_end(
        make_info(
            10,
            {
                "eval/int": 3,
                "eval/bool": np.bool_(True),
                "eval/np": np.float32(0.5),
                "eval/jax": jnp.asarray(0.25, jnp.bfloat16),
                "eval/nan": float("nan"),
            },
        )
    )
    ((_, row),) = writer.rows
    np.testing.assert_equal(
        row, {"eval/int": 3.0, "eval/bool": 1.0, "eval/np": 0.5, "eval/jax": 0.25, "eval/nan": np.nan}
    )


def test_arrays_are_left_out_with_one_notice(log, writer, caplog):
    metrics = {"eval/loss": 1.0, "eval/confusion": np.eye(3, dtype=np.int32), "eval/text": "a"}
    with caplog.at_level(logging.WARNING, logger="trainkit"):
        log.on_eval_end(make_info(10, metrics))
        log.on_eval_end(make_info(20, metrics))
    assert writer.rows == [(10, {"eval/loss": 1.0}), (20, {"eval/loss": 1.0})]
    notices = sorted(record.getMessage() for record in caplog.records)
    assert len(notices) == 2
    assert "eval/confusion is not a single number (its shape is (3, 3))" in notices[0]
    assert "eval/text" in notices[1]


def test_cadence():
    assert LogMetrics().every == Every(steps=50)
    assert LogMetrics(every=At(steps=3)).every == At(steps=3)
    assert LogMetrics.phase is Phase.WRITE
    with pytest.raises(TypeError, match=r"every=50.*tk\.Every"):
        LogMetrics(50)
