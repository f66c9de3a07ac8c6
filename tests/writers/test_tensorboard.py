"""What `TensorBoardWriter` writes, as TensorBoard's own reader sees it."""

import io
import itertools
import json
import sys
import warnings
import wave

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups, metadata
from tensorboard.plugins.mesh import metadata as mesh_metadata
from tensorboard.util.tensor_util import make_ndarray

from tests.helpers.writer_calls import CALLS, events
from trainkit.writers import TensorBoardWriter


@pytest.fixture
def writer(tmp_path):
    made = TensorBoardWriter(tmp_path)
    yield made
    made.close()


def png(logdir, tag) -> np.ndarray:
    (event,) = events(logdir).Images(tag)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_scalars_are_read_back(writer, tmp_path):
    for step in range(5):
        writer.write_scalars(step, {"train/loss": 1 / (step + 1), "train/top 1 %": step})
    read = events(tmp_path)
    assert sorted(read.Tags()["scalars"]) == ["train/loss", "train/top 1 %"]
    assert [e.step for e in read.Scalars("train/loss")] == list(range(5))
    np.testing.assert_allclose([e.value for e in read.Scalars("train/loss")], 1 / np.arange(1, 6), rtol=1e-7)


@pytest.mark.parametrize(
    "value",
    [3, True, 2.5, np.float16(2.5), np.int64(2**40), np.bool_(True), np.ones((1, 1)), jnp.bfloat16(2.5)],
)
def test_every_kind_of_number_is_a_scalar(writer, tmp_path, value):
    writer.write_scalars(1, {"x": value})
    assert events(tmp_path).Scalars("x")[0].value == float(np.asarray(value, np.float64).item())


def test_numbers_that_are_not_finite_are_kept(writer, tmp_path):
    writer.write_scalars(1, {"nan": float("nan"), "inf": jnp.inf, "low": -np.inf})
    read = events(tmp_path)
    assert np.isnan(read.Scalars("nan")[0].value)
    assert read.Scalars("inf")[0].value == np.inf
    assert read.Scalars("low")[0].value == -np.inf


def test_steps_beyond_32_bits_and_the_injected_time_are_kept(tmp_path):
    writer = TensorBoardWriter(tmp_path, clock=itertools.count(100.0).__next__)
    writer.write_scalars(2**40, {"x": 1.0})
    writer.close()
    (event,) = events(tmp_path).Scalars("x")
    assert (event.step, event.wall_time) == (2**40, 102.0)


def test_images_are_the_pixels_given(writer, tmp_path):
    generator = np.random.default_rng(0)
    exact = generator.integers(0, 256, (2, 6, 5, 3), np.uint8)
    writer.write_images(1, {"many": exact, "one": exact[0], "alpha": np.zeros((3, 4, 4), np.uint8)})
    np.testing.assert_array_equal(png(tmp_path, "many/0"), exact[0])
    np.testing.assert_array_equal(png(tmp_path, "many/1"), exact[1])
    np.testing.assert_array_equal(png(tmp_path, "one"), exact[0])
    assert png(tmp_path, "alpha").shape == (3, 4, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_floats_from_0_to_1_span_the_range(writer, tmp_path, dtype):
    ramp = np.linspace(0, 1, 5).reshape(1, 5, 1)
    writer.write_images(
        1, {"ramp": jnp.asarray(ramp).astype(dtype) if dtype is jnp.bfloat16 else ramp.astype(dtype)}
    )
    np.testing.assert_array_equal(png(tmp_path, "ramp")[0, :, 0], [0, 64, 128, 191, 255])


def test_integers_and_bools_are_images(writer, tmp_path):
    writer.write_images(1, {"int": np.full((2, 2, 1), 200), "bool": np.eye(2, dtype=bool)[..., None]})
    assert png(tmp_path, "int").max() == 200
    np.testing.assert_array_equal(png(tmp_path, "bool")[..., 0], [[255, 0], [0, 255]])


def test_videos_are_moving_gifs(writer, tmp_path):
    frames = np.stack([np.full((4, 6, 1), level, np.uint8) for level in (0, 100, 200)])
    writer.write_videos(1, {"one": frames, "many": np.stack([np.repeat(frames, 3, -1)] * 2)})
    read = events(tmp_path)
    assert sorted(read.Tags()["images"]) == ["many/0", "many/1", "one"]
    for tag in ("one", "many/1"):
        gif = Image.open(io.BytesIO(read.Images(tag)[0].encoded_image_string))
        levels = [np.asarray(frame.convert("L")).mean() for frame in ImageSequence.Iterator(gif)]
        np.testing.assert_allclose(levels, [0, 100, 200], atol=2)


def test_audio_is_a_wav_of_the_samples(writer, tmp_path):
    sound = np.sin(np.linspace(0, 20, 400)).reshape(1, 200, 2)
    writer.write_audios(1, {"tone": sound, "two": np.zeros((2, 8, 1))}, sample_rate=8000)
    read = events(tmp_path)
    assert sorted(read.Tags()["audio"]) == ["tone", "two/0", "two/1"]
    (event,) = read.Audio("tone")
    with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 200)
        samples = np.frombuffer(file.readframes(200), "<i2").reshape(200, 2) / 32767
    np.testing.assert_allclose(samples, sound[0], atol=1 / 32767)


def test_texts_keep_their_names_and_words(writer, tmp_path):
    writer.write_texts(1, {"note": "*héllo*"})
    read = events(tmp_path)
    assert read.SummaryMetadata("note").plugin_data.plugin_name == "text"
    assert make_ndarray(read.Tensors("note")[0].tensor_proto).item().decode() == "*héllo*"


def test_histograms_count_every_element(writer, tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    writer.write_histograms(1, {"w": values, "few": values, "same": np.ones(7)}, num_buckets={"few": 4})
    read = events(tmp_path)
    histogram = read.Histograms("w")[0].histogram_value
    assert sum(histogram.bucket) == histogram.num == 1000
    np.testing.assert_allclose([histogram.min, histogram.max], [values.min(), values.max()], rtol=1e-6)
    np.testing.assert_allclose(histogram.sum, values.astype(np.float64).sum(), rtol=1e-6)
    few = read.Histograms("few")[0].histogram_value
    counts, limits = np.histogram(values.astype(np.float64), 4)
    np.testing.assert_array_equal(few.bucket[-4:], counts)
    np.testing.assert_allclose(few.bucket_limit[-4:], limits[1:], rtol=1e-6)
    assert sum(read.Histograms("same")[0].histogram_value.bucket) == 7


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64]
)
def test_raw_tensors_keep_their_dtype(writer, tmp_path, dtype):
    value = np.arange(6).reshape(2, 3).astype(dtype)
    writer.write_summaries(1, {"raw": value})
    read = make_ndarray(events(tmp_path).Tensors("raw")[0].tensor_proto)
    assert read.dtype == value.dtype
    np.testing.assert_array_equal(read, value)


@pytest.mark.parametrize("form", ["proto", "bytes", "shared"])
def test_raw_tensors_carry_metadata(writer, tmp_path, form):
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="mine", content=b"c"))
    given = {"proto": {"raw": metadata}, "bytes": {"raw": metadata.SerializeToString()}, "shared": metadata}[
        form
    ]
    writer.write_summaries(1, {"raw": np.array(["a", "b"])}, metadata=given)
    read = events(tmp_path)
    assert read.PluginTagToContent("mine") == {"raw": b"c"}
    np.testing.assert_array_equal(make_ndarray(read.Tensors("raw")[0].tensor_proto), [b"a", b"b"])


def test_point_clouds_are_meshes_with_colors(writer, tmp_path):
    points = np.arange(12.0).reshape(4, 3)
    colors = {"cloud": np.full((4, 3), 255, np.uint8)}
    writer.write_pointcloud(
        1, {"cloud": points}, point_colors=colors, configs={"cloud": {"camera": {"fov": 60}}}
    )
    read = events(tmp_path)
    found = {}
    for tag, content in read.PluginTagToContent("mesh").items():
        data = mesh_metadata.parse_plugin_metadata(content)
        found[data.ContentType.Name(data.content_type)] = make_ndarray(read.Tensors(tag)[0].tensor_proto)
        assert (data.name, json.loads(data.json_config)) == ("cloud", {"camera": {"fov": 60}})
    np.testing.assert_array_equal(found["VERTEX"], points[None])
    np.testing.assert_array_equal(found["COLOR"], np.full((1, 4, 3), 255))


def test_hparams_are_on_the_page_with_the_metrics_of_the_run(tmp_path):
    for width in (8, 16):
        writer = TensorBoardWriter(tmp_path / f"width{width}")
        nested = {
            "model": {"width": width, "act": "relu"},
            "lr": np.float32(0.5),
            "sizes": [1, 2],
            "off": None,
        }
        writer.write_hparams(nested | {"bias": True})
        writer.write_scalars(1, {"eval/accuracy": width / 100})
        writer.close()
        assert events(tmp_path / f"width{width}").SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    context = backend_context.Context(
        type("Context", (), {"data_provider": MultiplexerDataProvider(multiplexer, str(tmp_path))})()
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=list(api_pb2.Status.values())
    )
    for name in ("model.width", "lr"):
        request.col_params.add(hparam=name)
    request.col_params.add(metric=api_pb2.MetricName(tag="eval/accuracy"))
    shown = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    rows = {}
    for group in shown:
        rows[group.hparams["model.width"].number_value] = dict(group.hparams), group.metric_values[0].value
    assert sorted(rows) == [8, 16]
    hparams, accuracy = rows[16]
    assert accuracy == pytest.approx(0.16, rel=1e-6)
    assert hparams["model.act"].string_value == "relu"
    assert hparams["lr"].number_value == 0.5
    assert hparams["sizes.1"].number_value == 2
    assert hparams["bias"].bool_value is True
    assert hparams["off"].string_value == ""


UNWRITABLE = {
    "text scalar": (lambda w: w.write_scalars(1, {"x": "high"}), "scalar 'x'.*numbers"),
    "none scalar": (lambda w: w.write_scalars(1, {"x": None}), "scalar 'x'.*numbers"),
    "vector scalar": (lambda w: w.write_scalars(1, {"x": np.ones(3)}), "not one number"),
    "complex scalar": (lambda w: w.write_scalars(1, {"x": 1j}), "complex"),
    "ragged scalar": (lambda w: w.write_scalars(1, {"x": [[1], [1, 2]]}), "cannot be read"),
    "huge scalar": (lambda w: w.write_scalars(1, {"x": 10**400}), "too large"),
    "too large scalar": (lambda w: w.write_scalars(1, {"x": 1e300}), "too large"),
    "image shape": (lambda w: w.write_images(1, {"x": np.zeros((4, 4))}), r"\[H, W, C\]"),
    "image channels": (lambda w: w.write_images(1, {"x": np.zeros((4, 4, 2))}), r"C 1, 3 or 4"),
    "empty image": (lambda w: w.write_images(1, {"x": np.zeros((0, 4, 4, 3))}), r"length 0"),
    "video shape": (lambda w: w.write_videos(1, {"x": np.zeros((4, 4, 3))}), r"\[T, H, W, C\]"),
    "audio shape": (lambda w: w.write_audios(1, {"x": np.zeros(5)}, sample_rate=8), r"\[N, T, C\]"),
    "audio integers": (lambda w: w.write_audios(1, {"x": np.ones((1, 5, 1), int)}, sample_rate=8), "floats"),
    "audio rate": (lambda w: w.write_audios(1, {"x": np.zeros((1, 5, 1))}, sample_rate=0), "sample rate"),
    "text": (lambda w: w.write_texts(1, {"x": 5}), "not a str"),
    "empty histogram": (lambda w: w.write_histograms(1, {"x": np.zeros(0)}), "empty"),
    "nan histogram": (lambda w: w.write_histograms(1, {"x": np.full(3, np.nan)}), "no finite"),
    "no buckets": (lambda w: w.write_histograms(1, {"x": np.ones(3)}, num_buckets={"x": -1}), "buckets"),
    "object tensor": (lambda w: w.write_summaries(1, {"x": np.array([object()])}), "neither"),
    "cloud shape": (lambda w: w.write_pointcloud(1, {"x": np.zeros((4, 2))}), r"\[N, 3\]"),
    "cloud colors": (
        lambda w: w.write_pointcloud(1, {"x": np.zeros((4, 3))}, point_colors={"x": np.zeros((5, 3))}),
        "another shape",
    ),
    "cloud config": (
        lambda w: w.write_pointcloud(1, {"x": np.zeros((4, 3))}, configs={"x": {"f": object()}}),
        "not JSON",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_told_once_and_harms_nothing(writer, tmp_path, case):
    call, message = UNWRITABLE[case]
    with pytest.warns(UserWarning, match=message):
        call(writer)
    call(writer)
    writer.write_scalars(2, {"after": 1.0})
    assert events(tmp_path).Tags()["scalars"] == ["after"]


def test_one_bad_value_does_not_take_the_others_with_it(writer, tmp_path):
    with pytest.warns(UserWarning, match="'bad'"):
        writer.write_scalars(1, {"first": 1.0, "bad": "x", "last": 2.0})
    assert sorted(events(tmp_path).Tags()["scalars"]) == ["first", "last"]


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_without_pillow_the_extra_is_named_once(writer, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "PIL", None)
    value = {"x": np.zeros((2, 4, 4, 3), np.uint8)}
    with pytest.warns(UserWarning, match=r'Pillow; pip install "trainkit\[media\]"'):
        getattr(writer, f"write_{kind}")(1, value)
    getattr(writer, f"write_{kind}")(2, value)


PARTLY = {
    "nan pixels": (lambda w: w.write_images(1, {"x": np.full((2, 2, 1), np.nan)}), "NaN was written as 0"),
    "bright pixels": (lambda w: w.write_images(1, {"x": np.full((2, 2, 1), 9.0)}), r"outside \[0, 1\]"),
    "large integers": (lambda w: w.write_images(1, {"x": np.full((2, 2, 1), 300)}), "outside 0..255"),
    "loud sound": (
        lambda w: w.write_audios(1, {"x": np.full((1, 2, 1), 9.0)}, sample_rate=8),
        r"outside \[-1, 1\]",
    ),
    "some nan": (lambda w: w.write_histograms(1, {"x": np.array([1.0, np.nan])}), "without its NaN"),
}


@pytest.mark.parametrize("case", PARTLY)
def test_what_is_changed_on_the_way_is_told_once(writer, tmp_path, case):
    call, message = PARTLY[case]
    with pytest.warns(UserWarning, match=message):
        call(writer)
    call(writer)
    tags = events(tmp_path).Tags()
    assert tags["images"] + tags["audio"] + tags["histograms"] == ["x"]


def test_an_empty_run_leaves_no_file(tmp_path):
    TensorBoardWriter(tmp_path / "run").close()
    assert list((tmp_path / "run").iterdir()) == []


def write_steps(logdir, steps, value, **options):
    writer = TensorBoardWriter(logdir, **options)
    for step in steps:
        writer.write_scalars(step, {"loss": value} | ({"gone": value} if value == 1 else {}))
    writer.close()


def shown(logdir, tag, loader) -> list[tuple[int, float]]:
    if loader == "files":
        return [(e.step, e.value) for path in sorted(logdir.iterdir()) for e in scalars_of(path, tag)]
    if loader == "accumulator":
        return [(e.step, e.value) for e in events(logdir).Scalars(tag)]
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    return [(e.step, make_ndarray(e.tensor_proto).item()) for e in multiplexer.Tensors(".", tag)]


def scalars_of(path, tag):
    read = events(path)
    return read.Scalars(tag) if tag in read.Tags()["scalars"] else []


# "files" is a reader that does not know the mark of a restart, as TensorBoard's fast loader.
@pytest.mark.parametrize("loader", ["accumulator", "multiplexer", "files"])
def test_a_purge_hides_what_the_resumed_runs_write_again(tmp_path, loader):
    write_steps(tmp_path, range(1, 11), 1.0)
    write_steps(tmp_path, range(7, 12), 2.0, purge_step=7)
    write_steps(tmp_path, range(9, 10), 3.0, purge_step=9)
    values = [1.0] * 6 + [2.0] * 2 + [3.0]
    assert shown(tmp_path, "loss", loader) == list(zip(range(1, 10), values, strict=True))
    assert shown(tmp_path, "gone", loader) == [(step, 1.0) for step in range(1, 7)]


@pytest.mark.parametrize("loader", ["accumulator", "multiplexer"])
def test_a_purge_hides_but_does_not_touch_the_files_of_other_programs(tmp_path, loader):
    write_steps(tmp_path, range(1, 6), 1.0)
    (path,) = tmp_path.iterdir()
    other = path.rename(path.with_name("events.out.tfevents.1.host"))
    before = other.read_bytes()
    write_steps(tmp_path, range(4, 5), 2.0, purge_step=4)
    assert other.read_bytes() == before
    assert shown(tmp_path, "loss", loader) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_purge_mends_a_file_cut_short(tmp_path):
    write_steps(tmp_path, range(1, 6), 1.0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    write_steps(tmp_path, [3], 2.0, purge_step=3)
    assert shown(tmp_path, "loss", "files") == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_writers_of_the_same_moment_get_files_of_their_own(tmp_path):
    for step in range(3):
        writer = TensorBoardWriter(tmp_path, clock=lambda: 1e9)
        writer.write_scalars(step, {"x": 1.0})
        writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert [e.step for e in events(tmp_path).Scalars("x")] == [0, 1, 2]


def test_a_closed_writer_says_so(writer, tmp_path):
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write_scalars(1, {"x": 1.0})


def test_every_kind_lands_in_one_file(writer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in CALLS.values():
            call(writer)
    assert len(list(tmp_path.iterdir())) == 1
    tags = events(tmp_path).Tags()
    assert tags["images"] == ["image/0", "image/1", "video"]
    assert tags["audio"] == ["audio"]
    assert tags["histograms"] == ["hist"]
    assert {"raw", "text"} <= set(tags["tensors"])


def test_scalars_without_a_chart_are_left_out_and_nothing_else(tmp_path):
    writer = TensorBoardWriter(tmp_path, without=("epoch",))
    writer.write_scalars(1, {"epoch": 1})
    writer.write_scalars(2, {"epoch": 1, "train/epoch": 2, "loss": 0.5})
    writer.close()
    assert sorted(events(tmp_path).Tags()["scalars"]) == ["loss", "train/epoch"]
