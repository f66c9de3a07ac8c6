"""A run that is killed again and again ends as one that never was. `python -m tests.faults.kill` kills oftener."""

import pytest

from tests.faults.kill import campaign

MOMENTS = ("starting", "compiling", "training", "saving", "saved", "removing", "rewinding")


def test_a_run_killed_at_every_moment_ends_as_one_that_was_not(tmp_path):
    table = campaign(len(MOMENTS), MOMENTS, tmp_path)
    assert not table.lost
    assert table.recovered.total() == len(MOMENTS)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    table = campaign(100, MOMENTS, tmp_path, seed=1)
    assert not table.lost
    assert table.recovered.total() == 100
