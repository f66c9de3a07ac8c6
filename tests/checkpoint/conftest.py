"""Keeps what the tests of this folder compile on disk: many of them make several trainers of the same programs."""

import pytest

from tests.helpers.compiled import kept_in


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    with kept_in(tmp_path_factory.mktemp("cache")):
        yield
