"""`read_idx` on files written here, on damaged ones, and on MNIST where it is at hand."""

import gzip
import pathlib
import struct
import tracemalloc

import numpy as np
import pytest

from trainkit.data import read_idx

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
MNIST = pathlib.Path(__file__).parents[3] / "shared" / "data"


def encode(array):
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_round_trip(tmp_path, dtype, shape, compress):
    array = (np.arange(np.prod(shape)) * 7 - 3).astype(dtype).reshape(shape)
    path = tmp_path / "file"
    path.write_bytes(compress(encode(array)))
    read = read_idx(path)
    np.testing.assert_array_equal(read, array, strict=True)
    assert read.dtype.isnative
    assert read.flags.writeable


ARRAY = np.arange(12, dtype=np.int16).reshape(3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG\r\n", "begins with 89 50 4e 47"),
        (b"\0\0\x0a\x01\0\0\0\0", "begins with 00 00 0a 01"),
        (encode(ARRAY)[:7], "header needs 12 bytes and it has 7"),
        (encode(ARRAY)[:-1], r"truncated: int16\[3, 4\] needs 24 bytes after the header and there are 23"),
        (encode(ARRAY) + b"\0", r"too long: int16\[3, 4\] needs 24 .* there are 25"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "truncated: uint8"),
        (gzip.compress(encode(ARRAY) + b"\0", mtime=0), r"too long: int16\[3, 4\] needs 24 .* there are 25"),
        (gzip.compress(b"\0\0\x08\x04" + b"\xff" * 16, mtime=0), "truncated: uint8"),
        (gzip.compress(encode(ARRAY), mtime=0)[:-9], "truncated or damaged gzip"),
        (gzip.compress(encode(ARRAY), mtime=0)[:20] + b"\xff" * 20, "truncated or damaged gzip"),
    ],
    ids=[
        "empty",
        "png",
        "dtype",
        "header",
        "short",
        "long",
        "huge",
        "gzip_long",
        "gzip_huge",
        "gzip_short",
        "gzip_damaged",
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_idx(path)
    assert str(path) in str(raised.value)


def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(encode(ARRAY) + bytes(100_000_000), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="too long"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.skipif(not (MNIST / "t10k-labels-idx1-ubyte.gz").exists(), reason="MNIST is not at hand")
def test_mnist():
    images = read_idx(MNIST / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(MNIST / "t10k-labels-idx1-ubyte.gz")
    assert images.shape == (10000, 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
