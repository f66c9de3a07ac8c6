"""Proofs for what people plug in: strategies, callbacks, writers and sources of their own.

Each function runs what it is given and raises an `AssertionError` that says which promise was broken. Owns what
is promised; needs no test runner, and nothing in the package imports it.
"""

from trainkit.testing._callbacks import check_callback
from trainkit.testing._sources import check_source
from trainkit.testing._strategies import check_strategy
from trainkit.testing._writers import check_writer

__all__ = ["check_callback", "check_source", "check_strategy", "check_writer"]
