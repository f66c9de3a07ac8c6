"""Logs that are not what was written: a run goes on with what can be read of them, and says what it left out."""

import json
import logging
import os
import random
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from tests.helpers.writer_calls import events
from trainkit.writers import open_writer, read_jsonl
from trainkit.writers._checksum import crc32c

STEPS = list(range(1, 6))


def write(logdir, steps=STEPS):
    writer = open_writer(logdir)
    for step in steps:
        writer.write_scalars(step, {"x": step / 2})
    writer.close()


def resume(logdir, step=100):
    """Goes on after a step as a resumed fit does, and logs one more."""
    writer = open_writer(logdir)
    try:
        writer.rewind(step, ("x",))
        writer.write_scalars(1000, {"x": 0.0})
    finally:
        writer.close()


def event_file(logdir):
    return min(logdir.glob("*.trainkit"))


def shown(logdir):
    return [event.step for event in events(logdir).Scalars("x")]


def lines(logdir):
    return [line["step"] for line in read_jsonl(logdir / "metrics.jsonl")]


def frame(data, *, length=None, check=None):
    head = struct.pack("<Q", len(data) if length is None else length)
    check = masked_crc32c(data) if check is None else check
    return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", check)


def one(step, **fields):
    return Event(step=step, **fields).SerializeToString()


def offsets(content):
    """Returns where the records of an event file begin."""
    found, at = [], 0
    while at < len(content):
        found.append(at)
        at += 16 + struct.unpack_from("<Q", content, at)[0]
    return found


# Event files ----------------------------------------------------------------------------------------------

TAILS = {
    "claims 2**62 bytes": struct.pack("<QI", 2**62, masked_crc32c(struct.pack("<Q", 2**62))) + b"x" * 40,
    "random": random.Random(0).randbytes(500),
    "torn": frame(b"x" * 100)[:-3],
    "one byte": b"\0",
    "no event": frame(b"\xff" * 30),
    "another checksum": frame(one(7), check=7),
}


@pytest.mark.parametrize("tail", TAILS)
def test_a_tail_that_is_no_event_is_cut_off_and_told_once(tmp_path, caplog, tail):
    write(tmp_path)
    path = event_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + TAILS[tail])
    resume(tmp_path)
    (told,) = caplog.messages
    assert str(path) in told
    assert "6 events stay" in told  # the first one is the version of the file
    assert path.read_bytes() == whole
    assert shown(tmp_path) == [*STEPS, 1000]
    caplog.clear()
    resume(tmp_path, 1000)
    assert not caplog.messages


def test_of_a_damaged_event_in_the_middle_the_others_stay(tmp_path, caplog):
    write(tmp_path)
    path = event_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[offsets(content)[3] + 20] ^= 1  # in the data of step 3
    path.write_bytes(content)
    resume(tmp_path)
    assert "1 events and the last 0 bytes" in caplog.text
    assert shown(tmp_path) == [1, 2, 4, 5, 1000]


def test_behind_a_damaged_length_nothing_is_believed(tmp_path, caplog):
    write(tmp_path)
    path = event_file(tmp_path)
    content = bytearray(path.read_bytes())
    at = offsets(content)[3]
    content[at] ^= 1
    path.write_bytes(content)
    resume(tmp_path)
    assert f"the last {len(content) - at} bytes" in caplog.text
    assert shown(tmp_path) == [1, 2, 1000]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_what_is_no_event_file_is_left_alone_and_told(tmp_path, caplog, kind):
    logdir, outside = tmp_path / "run", tmp_path / "outside"
    write(logdir)
    outside.write_bytes(event_file(logdir).read_bytes())
    before = outside.read_bytes()
    odd = logdir / "events.out.tfevents.1.host.1.trainkit"
    make = {
        "folder": odd.mkdir,
        "pipe": lambda: os.mkfifo(odd),
        "link": lambda: odd.symlink_to(outside),
        "dangling": lambda: odd.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    resume(logdir, 2)
    (told,) = caplog.messages
    assert odd.name in told
    assert outside.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()
    assert lines(logdir) == [1, 2, 1000]


# metrics.jsonl --------------------------------------------------------------------------------------------

BAD_LINES = {
    "cut": b'{"step": 3, "ti',
    "zeros": b"\0" * 50,
    "deep": b"[" * 50_000,
    "deep in a line": b'{"step": 3, "scalars": {"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
    "no object": b"[1, 2]",
    "step is text": b'{"step": "3", "scalars": {"x": 1.0}}',
    "step is a list": b'{"step": [3], "scalars": {"x": 1.0}}',
    "step is NaN": b'{"step": NaN, "scalars": {"x": 1.0}}',
    "step is true": b'{"step": true, "scalars": {"x": 1.0}}',
    "no scalars": b'{"step": 3, "scalars": [1.0]}',
    "no number": b'{"step": 3, "scalars": {"x": {}}}',
    "bytes": b"\xff\xfe\xfa",
    "UTF-16": '{"step": 3, "scalars": {"x": 1.0}}'.encode("utf-16"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_line_that_cannot_be_read_is_left_out_and_told_once(tmp_path, caplog, bad):
    write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes().split(b"\n")
    content[2] = BAD_LINES[bad]
    path.write_bytes(b"\n".join(content))
    with pytest.raises(ValueError, match=r"metrics\.jsonl': line 3 (is|has) "):
        read_jsonl(path)
    resume(tmp_path)
    (told,) = caplog.messages
    assert str(path) in told
    assert "line 3 " in told
    assert "4 lines stay" in told
    assert lines(tmp_path) == [1, 2, 4, 5, 1000]


def test_a_number_that_json_has_and_floats_have_not(tmp_path, caplog):
    write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 6, "hparams": {"x": 1e999}}\n')
    resume(tmp_path, 6)
    assert "line 6 can't be written again" in caplog.text
    assert lines(tmp_path) == [*STEPS, 1000]


def test_lines_that_stay_keep_their_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = b'{"step":1,  "time": 1.50, "scalars": {"x": 1.50}}\n'
    path.write_bytes(odd + b"nothing\n")
    resume(tmp_path)
    assert path.read_bytes().startswith(odd)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_a_log_that_is_no_file_is_named_before_anything_is_written(tmp_path, kind):
    logdir, outside = tmp_path / "run", tmp_path / "outside"
    write(logdir)
    log = logdir / "metrics.jsonl"
    before = log.read_bytes()
    outside.write_bytes(before)
    log.unlink()
    make = {
        "folder": log.mkdir,
        "pipe": lambda: os.mkfifo(log),
        "link": lambda: log.symlink_to(outside),
        "dangling": lambda: log.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    with pytest.raises(OSError, match=r"metrics\.jsonl' is .*, where a regular file is expected"):
        open_writer(logdir)
    assert outside.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()
    log.rmdir() if kind == "folder" else log.unlink()
    open_writer(logdir).close()  # the folder is free


def test_a_backup_of_hard_links_stays_as_it_was(tmp_path):
    logdir, backup = tmp_path / "run", tmp_path / "backup"
    write(logdir)
    subprocess.run(["cp", "-al", logdir, backup], check=True)
    before = {path.name: path.read_bytes() for path in backup.iterdir()}
    write(logdir, [6])  # goes on, without taking anything back
    resume(logdir, 3)
    assert {path.name: path.read_bytes() for path in backup.iterdir()} == before
    assert lines(logdir) == [1, 2, 3, 1000]


# Size -----------------------------------------------------------------------------------------------------

LARGE = 1_900_000_000


def test_a_gigabyte_that_is_no_record_takes_no_gigabyte(tmp_path):
    """Sparse files that really have the size."""
    write(tmp_path)
    path, log = event_file(tmp_path), tmp_path / "metrics.jsonl"
    size = path.stat().st_size
    head = struct.pack("<Q", LARGE)
    with path.open("ab") as file:
        file.write(head + struct.pack("<I", masked_crc32c(head)))
        file.truncate(size + LARGE + 16)
    with path.open("ab") as file:
        file.write(frame(one(6)))
    with log.open("ab") as file:
        file.write(b'{"step": 6, "texts": {"x": "')
        file.truncate(log.stat().st_size + 200_000_000)
    code = """
import logging, resource, sys, tests.writers.test_damage as t, pathlib
logging.basicConfig()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
t.resume(pathlib.Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120_000  # KiB
    assert "1 events and the last 0 bytes" in done.stderr
    assert "line 6 is longer than 16 MiB" in done.stderr
    assert path.stat().st_size < 2 * size
    assert lines(tmp_path) == [*STEPS, 1000]


def test_what_is_too_large_to_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("trainkit.writers._jsonl.MOST", 1000)
    monkeypatch.setattr("trainkit.writers._events.MOST", 1000)
    writer = open_writer(tmp_path)
    with pytest.warns(UserWarning, match="not written") as told:
        writer.write_texts(1, {"story": "long " * 300})
    assert len(told) == 2  # each of the writers
    writer.write_texts(1, {"story": "long " * 300})  # said once
    writer.write_scalars(2, {"x": 1.0})
    writer.close()
    assert lines(tmp_path) == shown(tmp_path) == [2]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, (1 << 14) - 1, (1 << 14) + 1, (1 << 20) + 300])
def test_the_checksum_is_that_of_tensorboardx(size):
    from trainkit.writers._checksum import masked

    data = random.Random(size).randbytes(size)
    assert masked(data) == masked_crc32c(data)
    value = crc32c(data)
    assert ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF == masked_crc32c(data)


# By chance ------------------------------------------------------------------------------------------------


def test_whatever_becomes_of_the_files_the_run_goes_on(tmp_path, caplog):
    chance = random.Random(1)
    whole = {}
    write(tmp_path / "first")
    for path in (tmp_path / "first").iterdir():
        whole[path.name] = path.read_bytes()
    caplog.set_level(logging.CRITICAL)
    for number in range(150):
        logdir = tmp_path / str(number)
        logdir.mkdir()
        for name, content in whole.items():
            (logdir / name).write_bytes(damaged(content, chance))
        resume(logdir)
        assert lines(logdir)[-1] == 1000
        assert shown(logdir)[-1] == 1000
        for line in (logdir / "metrics.jsonl").read_bytes().splitlines():
            json.loads(line)


def damaged(content, chance):
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content))
        kind = chance.choice(["flip", "set", "cut", "insert", "twice"])
        if kind == "flip":
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "set":
            content[at : at + 8] = bytes(min(8, len(content) - at))
        elif kind == "cut":
            del content[max(at, 1) :]
        elif kind == "insert":
            content[at:at] = chance.randbytes(20)
        else:
            content += content[at:]
    return bytes(content)
