"""Regular files only, and never through a link."""

import os

import pytest

from trainkit._core.files import NotRegular, make_folder, open_regular, read_regular, remove

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def append(path, content):
    with open(open_regular(path, APPEND), "ab") as file:
        file.write(content)


@pytest.mark.parametrize("flags", [os.O_RDONLY, APPEND])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_by_name_and_nothing_blocks(tmp_path, kind, flags):
    path, outside = tmp_path / "log", tmp_path / "outside"
    if kind == "link":
        outside.write_bytes(b"theirs")
    make = {
        "link": lambda: path.symlink_to(outside),
        "dangling": lambda: path.symlink_to(outside),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(NotRegular, match=r"log.*regular file is expected"):
        open_regular(path, flags)
    assert outside.exists() == (kind == "link")


def test_a_file_with_another_name_is_parted_before_it_is_written(tmp_path):
    path, backup = tmp_path / "log", tmp_path / "backup"
    append(path, b"one")
    os.chmod(path, 0o640)
    os.link(path, backup)
    append(path, b"two")
    assert path.read_bytes() == b"onetwo"
    assert backup.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(one.name for one in tmp_path.iterdir()) == ["backup", "log"]


def test_reading_leaves_other_names_alone(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one")
    os.link(path, tmp_path / "backup")
    assert read_regular(path) == b"one"
    assert path.stat().st_nlink == 2


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "outside")
    with pytest.raises(NotADirectoryError, match="folder"):
        make_folder(tmp_path / "folder")
    make_folder(tmp_path / "other")
    make_folder(tmp_path / "other")
    assert (tmp_path / "other").is_dir()


def test_a_link_is_removed_and_what_it_points_to_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").touch()
    (tmp_path / "link").symlink_to(outside)
    remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (outside / "theirs").exists()
    remove(outside)
    assert not outside.exists()
    remove(outside)
