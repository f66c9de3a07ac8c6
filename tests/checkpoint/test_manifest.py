"""Every file of a checkpoint is known with its size and content."""

import json
import os
import stat

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


def listing(folder, change):
    entries = json.loads((folder / NAME).read_text())
    change(entries)
    (folder / NAME).write_text(json.dumps(entries))


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "deep/../../outside", "", ".", "deep//er", "a\0b", "/dev/zero"]
)
def test_names_that_lead_elsewhere_are_not_read(folder, name, tmp_path):
    (tmp_path.parent / "outside").write_bytes(b"abc")
    listing(folder, lambda entries: entries.update({name: [3, 891568578]}))
    assert problems(folder) == [f"{name}: is no file of this folder"]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
        (lambda path: path.symlink_to(path.with_name("empty")), "a symbolic link"),
        (lambda path: os.mknod(path, stat.S_IFCHR, os.makedev(1, 5)), "a device"),
    ],
)
def test_what_is_no_regular_file_is_not_opened(folder, make, kind):
    (folder / "a").unlink()
    try:
        make(folder / "a")
    except PermissionError:
        pytest.skip("needs the right to make devices")
    (line,) = problems(folder)
    assert line.startswith("a: cannot be read (")
    assert kind in line


def test_files_behind_a_link_are_not_read(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "deep"
    (folder / "deep").rename(elsewhere)
    (folder / "deep").symlink_to(elsewhere)
    assert problems(folder) == ["deep/er/large: lies behind a symbolic link"]


@pytest.mark.parametrize(
    "entry", [None, 3, [3], ["3", "4"], [3, 4, 5], {"size": 3}, [True, False], [3.0, 4.0]]
)
def test_entries_of_another_form_are_damage(folder, entry):
    listing(folder, lambda entries: entries.update(a=entry))
    assert problems(folder) == ["a: its size and checksum are not listed as two numbers"]


def test_what_a_checkpoint_is_read_by_must_be_listed(folder):
    listing(folder, dict.clear)
    found = problems(folder, items=("state",), documents=("meta.json",))
    assert found == [
        f"{name}: is not listed" for name in ("meta.json", "state/_METADATA", "state/manifest.ocdbt")
    ]
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        write_manifest(folder, documents=("meta.json",))


def test_a_list_nested_deep_is_damage(folder):
    (folder / NAME).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    (line,) = problems(folder)
    assert line.startswith(f"{NAME}: cannot be read (")
