"""A batch of no rows is refused in words, wherever it comes."""

import numpy as np
import pytest

from tests.helpers.weight import numbers, trainer

NONE = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    "batches", [[NONE], [NONE, *numbers(1)], [*numbers(1), NONE]], ids=["only", "first", "later"]
)
@pytest.mark.parametrize("use", ["fit", "evaluate", "predict"])
def test_a_batch_of_no_rows_is_refused(batches, use):
    made = trainer()
    act = {"fit": lambda: made.fit(lambda: iter(batches), epochs=1)}.get(
        use, lambda: getattr(made, use)(lambda: iter(batches))
    )
    with pytest.raises(ValueError, match=r"a batch for \w+ has 0 rows"):
        act()
