"""What `JsonlWriter` writes, read by a strict JSON parser and by `read_jsonl`."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.writer_calls import CALLS
from trainkit.writers import JsonlWriter, read_jsonl


def strict(path) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def writer(tmp_path):
    made = JsonlWriter(tmp_path, clock=lambda: 5.0)
    yield made
    made.close()


def write_steps(folder, steps, **options):
    writer = JsonlWriter(folder, clock=lambda: 5.0, **options)
    for step in steps:
        writer.write_scalars(step, {"loss": step / 2})
    writer.close()


def test_scalars_are_one_line_a_call(writer, path):
    writer.write_scalars(1, {"loss": 0.1, "half": jnp.bfloat16(0.5), "count": np.int64(2**60), "flag": True})
    assert strict(path) == [
        {"step": 1, "time": 5.0, "scalars": {"loss": 0.1, "half": 0.5, "count": 2**60, "flag": 1}}
    ]


def test_what_is_not_finite_is_strict_json_and_comes_back(writer, path):
    writer.write_scalars(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)})
    assert strict(path)[0]["scalars"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    read = read_jsonl(path)[0]["scalars"]
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (math.inf, -math.inf)


def test_texts_and_hparams_are_kept(writer, path):
    writer.write_texts(2, {"note": "two\nlines é"})
    writer.write_hparams(
        {"lr": math.nan, "model": {"act": jnp.tanh, "sizes": (1, 2)}, "none": None, "b": np.bool_(1)}
    )
    text, hparams = strict(path)
    assert text == {"step": 2, "time": 5.0, "texts": {"note": "two\nlines é"}}
    assert hparams["hparams"] == {
        "lr": "NaN",
        "model.act": "tanh",
        "model.sizes.0": 1,
        "model.sizes.1": 2,
        "none": "",
        "b": True,
    }


def test_arrays_are_noted_with_shape_and_dtype(writer, path):
    for name in ("write_images", "write_histograms", "write_summaries", "write_audios", "write_videos"):
        CALLS[name](writer)
    writer.write_pointcloud(1, {"cloud": jnp.zeros((7, 3))})
    lines = {kind: line[kind] for line in strict(path) for kind in line if kind not in ("step", "time")}
    assert lines == {
        "images": {"image": {"shape": [2, 4, 5, 3], "dtype": "uint8"}},
        "histograms": {"hist": {"shape": [9], "dtype": "float64"}},
        "summaries": {"raw": {"shape": [2, 3], "dtype": "float64"}},
        "audios": {"audio": {"shape": [1, 16, 2], "dtype": "float64"}},
        "videos": {"video": {"shape": [1, 2, 4, 5, 3], "dtype": "uint8"}},
        "pointclouds": {"cloud": {"shape": [7, 3], "dtype": "float32"}},
    }


def test_a_scalar_that_is_no_number_is_told_once(writer, path):
    with pytest.warns(UserWarning, match="JsonlWriter: scalar 'bad'"):
        writer.write_scalars(1, {"bad": "x", "good": 1})
    writer.write_scalars(2, {"bad": "x"})
    assert [line["scalars"] for line in strict(path)] == [{"good": 1}]


def test_a_second_writer_continues_the_file(tmp_path, path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [3])
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_last_line_cut_short_is_left_out_and_mended(tmp_path, path, cut):
    write_steps(tmp_path, [1, 2])
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [1, 2] if cut == 1 else [1]
    assert [line["step"] for line in read_jsonl(path)] == kept
    write_steps(tmp_path, [3])
    assert [line["step"] for line in strict(path)] == [*kept, 3]


def test_damage_within_is_an_error_that_names_the_line(tmp_path, path):
    write_steps(tmp_path, [1, 2, 3])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:9], lines[2], b""]))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_a_purge_takes_out_what_the_resumed_run_writes_again(tmp_path, path):
    first = JsonlWriter(tmp_path, clock=lambda: 5.0)
    first.write_hparams({"lr": 0.1})
    for step in range(1, 6):
        first.write_scalars(step, {"loss": math.nan})
    first.close()
    write_steps(tmp_path, [4, 5], purge_step=4)
    lines = strict(path)
    assert [line.get("step") for line in lines] == [None, 1, 2, 3, 4, 5]
    assert [line["scalars"]["loss"] for line in lines[1:]] == ["NaN"] * 3 + [2.0, 2.5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_empty_run_leaves_no_file(tmp_path, path):
    JsonlWriter(tmp_path).close()
    assert not path.exists()


def test_a_closed_writer_says_so(writer):
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write_scalars(1, {"x": 1.0})


def test_rewinding_to_the_start_takes_back_the_hyperparameters_too(tmp_path):
    writer = JsonlWriter(tmp_path, clock=lambda: 0.0)
    writer.write_hparams({"width": 3})
    writer.write_scalars(2, {"x": 1.0})
    writer.rewind(2, ["x"])
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    writer.rewind(0, ())
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    writer.close()
