"""Each guide reports how far it is from the loop written by hand."""

import pytest

from tests.helpers.guides import largest_difference


@pytest.fixture
def check(record_property):
    """Compares a record with a loop written by hand: bitwise, but for `atol`; losses within `rtol`.

    The logged loss is a sum divided by a count, and not `jnp.mean`: it may differ in the last bit.
    """

    def run(record, by_hand, *, atol=0.0, rtol=3e-7):
        trees, losses = largest_difference(record, by_hand)
        record_property("largest difference", trees)
        record_property("largest relative difference of losses", losses)
        print(f"largest difference {trees:.1e}, of losses {losses:.1e}")
        assert trees <= atol
        assert losses <= rtol

    return run
