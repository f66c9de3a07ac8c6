"""Folders that cannot be logged to, and folders that are being logged to already."""

import gc

import pytest

from tests.helpers.writer_calls import events
from trainkit.writers import JsonlWriter, TensorBoardWriter, open_writer

KINDS = {"TensorBoard": TensorBoardWriter, "JSONL": JsonlWriter}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_a_second_live_writer_is_refused_with_the_folder_and_the_cure(tmp_path, kind):
    first = KINDS[kind](tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*live {kind} writer.*close\(\)"):
        KINDS[kind](tmp_path / "sub" / "..")
    first.close()
    KINDS[kind](tmp_path).close()


def test_closing_twice_does_not_free_the_folder_of_another(tmp_path, kind):
    first = KINDS[kind](tmp_path)
    first.close()
    second = KINDS[kind](tmp_path)
    first.close()
    with pytest.raises(ValueError, match="live"):
        KINDS[kind](tmp_path)
    second.close()


def test_a_writer_that_is_gone_frees_its_folder(tmp_path, kind):
    KINDS[kind](tmp_path)
    gc.collect()
    KINDS[kind](tmp_path).close()


def test_a_file_in_the_way_is_named_at_once(tmp_path, kind):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FileExistsError, match=r"logdir must be a folder.*runs"):
        KINDS[kind](tmp_path / "runs")
    with pytest.raises(NotADirectoryError, match=r"logdir must be a folder.*digits"):
        KINDS[kind](tmp_path / "runs" / "digits")


def test_a_folder_that_takes_no_files_is_refused_at_once(kind):
    # Even root cannot write there.
    with pytest.raises(OSError, match="logdir must be a folder"):
        KINDS[kind]("/proc/self")


def test_a_remote_address_is_refused(kind):
    with pytest.raises(ValueError, match=r"gs://bucket/run.*local folder"):
        KINDS[kind]("gs://bucket/run")


def test_a_str_and_a_new_nested_folder_are_taken(tmp_path, kind):
    writer = KINDS[kind](str(tmp_path / "a" / "b"))
    writer.write_scalars(1, {"x": 1.0})
    writer.close()
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1


def test_a_default_that_fails_half_way_frees_the_folder(tmp_path):
    held = JsonlWriter(tmp_path)
    with pytest.raises(ValueError, match="live JSONL"):
        open_writer(tmp_path)
    TensorBoardWriter(tmp_path).close()
    held.close()


def test_the_default_writes_both(tmp_path):
    writer = open_writer(tmp_path)
    writer.write_scalars(1, {"x": 0.5})
    writer.close()
    assert events(tmp_path).Scalars("x")[0].value == 0.5
    assert '"x": 0.5' in (tmp_path / "metrics.jsonl").read_text()
