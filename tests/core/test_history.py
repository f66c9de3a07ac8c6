"""`History.best`."""

import pytest

from trainkit._core.history import History


def history(*values):
    made = History()
    for step, value in enumerate(values, 1):
        made.append(step, {"x": value})
    return made


def test_best_is_the_first_of_equal_ones_and_no_nan():
    nan, inf = float("nan"), float("inf")
    assert history(nan, 2.0, 1.0, 1.0, 3.0).best("x", "min") == (3, 1.0)
    assert history(nan, 2.0, 3.0, 1.0, 3.0).best("x", "max") == (3, 3.0)
    assert history(inf, nan).best("x", "min") == (1, inf)
    assert history(nan).best("x", "min") is None
    assert history(1.0, 2.0).shown().best("x", "max") == (2, 2.0)


def test_other_words_and_names_are_refused():
    with pytest.raises(ValueError, match=r'mode=\'up\': the choices are "min" and "max"'):
        history(1.0).best("x", "up")
    with pytest.raises(KeyError, match="nothing was logged as 'y'; the names are x"):
        history(1.0).best("y", "min")
