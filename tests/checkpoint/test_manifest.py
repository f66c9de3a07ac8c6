"""Every file of a checkpoint is known with its size and content."""

import pytest

from tests.helpers.runs import flip
from trainkit.checkpoint._manifest import NAME, problems, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "deep" / "er" / "large").write_bytes(bytes(range(256)) * (1 << 15))  # several chunks
    write_manifest(tmp_path)
    (tmp_path / "_CHECKPOINT_METADATA").write_text('{"written": "afterwards"}')
    return tmp_path


def test_a_whole_folder_has_no_problems(folder):
    assert problems(folder) == []


def test_files_that_came_later_are_no_problem(folder):
    (folder / "scores.json").write_text("{}")
    assert problems(folder) == []


@pytest.mark.parametrize("name", ["a", "empty", "deep/er/large"])
@pytest.mark.parametrize("damage", ["missing", "longer"])
def test_missing_and_longer_files(folder, name, damage):
    path, size = folder / name, (folder / name).stat().st_size
    if damage == "missing":
        path.unlink()
        assert problems(folder) == [f"{name}: is missing"]
    else:
        path.write_bytes(path.read_bytes() + b"x")
        assert problems(folder) == [f"{name}: has {size + 1} bytes, {size} were written"]


@pytest.mark.parametrize("offset", [0, 1 << 22, -1])
def test_one_bit(folder, offset):
    flip(folder / "deep/er/large", offset)
    assert problems(folder) == ["deep/er/large: its content was changed (the checksum differs)"]


def test_truncated(folder):
    (folder / "a").write_bytes(b"ab")
    (folder / "deep/er/large").write_bytes(b"")
    assert problems(folder) == [
        "a: has 2 bytes, 3 were written",
        f"deep/er/large: has 0 bytes, {1 << 23} were written",
    ]


@pytest.mark.parametrize("name", [NAME, "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [None, b"", b'{"a": [1'])
def test_without_its_list_or_the_mark_of_completion_a_folder_is_not_whole(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    (line,) = problems(folder)
    assert line.startswith(f"{name}: cannot be read (")


def test_a_list_that_is_no_list_is_told(folder):
    (folder / NAME).write_text("[1, 2]")
    (line,) = problems(folder)
    assert line.startswith(f"{NAME}: cannot be read (")


def test_a_folder_in_the_place_of_a_file(folder):
    (folder / "a").unlink()
    (folder / "a").mkdir()
    assert [line.split(":")[0] for line in problems(folder)] == ["a"]
