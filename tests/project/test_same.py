"""The tool that compares the numbers of two trees (`make same`): what it calls equal, and what it says of the rest."""

import copy

import numpy as np
import pytest

from tests.helpers.same_runs import as_hex, digest
from tests.same import ROOT, compare, differences, write_tree

BASE = {
    "losses": [as_hex(np.float32(loss)) for loss in (0.7, 0.1, np.nan)],
    "logged": [["train/loss at 1", as_hex(0.7)], ["train/loss at 2", as_hex(0.1)]],
    "scores": {"accuracy": as_hex(0.5)},
    "digests": {"params": digest({"w": np.ones(2, np.float32)})},
}


def changed(**parts):
    return {**copy.deepcopy(BASE), **parts}


def test_equal_bits_are_equal_and_so_is_nan():
    assert differences(BASE, changed()) == []
    assert compare({"run": BASE}, {"run": changed()})[1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"losses": [BASE["losses"][0], as_hex(np.nextafter(np.float32(0.1), 1)), as_hex(1.0)]},
            "loss of step 2: 0.1",
        ),
        ({"losses": BASE["losses"][:2]}, "2 steps, were 3"),
        ({"logged": BASE["logged"][:1]}, "names that are logged: train/loss at 2"),
        ({"scores": {"accuracy": as_hex(0.25)}}, "scores: accuracy: 0.25, was 0.5 (-2.5e-01)"),
        ({"digests": {"params": digest({"w": np.ones(2, np.float64)})}}, "bits of params"),
    ],
)
def test_a_difference_is_told_by_where_it_begins(other, said):
    found = differences(BASE, changed(**other))
    assert len(found) == 1
    assert found[0].startswith(said)
    table, equal = compare({"run": BASE}, {"run": changed(**other)})
    assert found[0] in table
    assert not equal


def test_a_commit_that_is_not_there_is_refused(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("the sources were not checked out with git")
    with pytest.raises(SystemExit, match="git has no 'no-such-commit'"):
        write_tree("no-such-commit", tmp_path)
