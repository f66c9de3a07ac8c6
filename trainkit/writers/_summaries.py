"""TensorBoard's protocol buffers for every kind of value.

Owns shapes, ranges and encodings; writes no file. Imports tensorboardX, so it is itself imported where a
writer is made.
"""

# tensorboardX makes its protocol buffers at run time, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import io
import json
import math
import wave
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tensorboardX import summary as tbx
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

from trainkit.writers._values import Unwritable, as_array, as_number, flat_hparams

Note = Callable[[str], None]
"""Takes a reason why a value was written only in part."""

_MEDIA = 'pip install "trainkit[media]"'
_DTYPES = {
    "float32": "DT_FLOAT",
    "float64": "DT_DOUBLE",
    "float16": "DT_HALF",
    "int8": "DT_INT8",
    "int16": "DT_INT16",
    "int32": "DT_INT32",
    "int64": "DT_INT64",
    "uint8": "DT_UINT8",
    "uint16": "DT_UINT16",
    "uint32": "DT_UINT32",
    "uint64": "DT_UINT64",
    "bool": "DT_BOOL",
    "complex64": "DT_COMPLEX64",
    "complex128": "DT_COMPLEX128",
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FRAME_MILLISECONDS = 250
_DEFAULT_BUCKETS = 30


def scalar(name: str, value: Any) -> Summary.Value:
    """Returns a number; TensorBoard holds scalars as float32."""
    number = as_number(value)
    if _FLOAT32_MAX < abs(number) < math.inf:
        raise Unwritable("not written: it is too large for float32, in which TensorBoard holds scalars")
    return Summary.Value(tag=name, simple_value=number)


def images(name: str, value: Any, note: Note) -> Iterator[Summary.Value]:
    """Yields images `[N, H, W, C]` or `[H, W, C]` as PNG; several are named `name/0`, `name/1`, ..."""
    pixels = _as_pixels(value, rank=3, shapes="[N, H, W, C] or [H, W, C]", note=note)
    for tag, image in _numbered(name, pixels):
        try:
            (encoded,) = tbx.image(tag, image, dataformats="HWC").value
        except ImportError:
            raise Unwritable(f"not written: images need Pillow; {_MEDIA}") from None
        encoded.tag = tag
        yield encoded


def videos(name: str, value: Any, note: Note) -> Iterator[Summary.Value]:
    """Yields videos `[N, T, H, W, C]` or `[T, H, W, C]` as animated GIF, four frames a second."""
    pixels = _as_pixels(value, rank=4, shapes="[N, T, H, W, C] or [T, H, W, C]", note=note)
    for tag, frames in _numbered(name, pixels):
        _, height, width, channels = frames.shape
        encoded = _gif(frames)
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
        yield Summary.Value(tag=tag, image=image)


def audios(name: str, value: Any, sample_rate: int, note: Note) -> Iterator[Summary.Value]:
    """Yields sounds `[N, T, C]` as WAV of 16 bits."""
    samples = as_array(value)
    if samples.ndim != 3 or not samples.size:
        raise Unwritable("not written: its shape is not [N, T, C]")
    if sample_rate < 1:
        raise Unwritable("not written: its sample rate is below 1")
    if samples.dtype.kind != "f":
        raise Unwritable("not written: audio takes floats in [-1, 1]")
    samples = np.rint(_clipped(samples, -1.0, 1.0, note) * 32767).astype("<i2")
    for tag, sound in _numbered(name, samples):
        frames, channels = sound.shape
        audio = Summary.Audio(
            sample_rate=sample_rate,
            num_channels=channels,
            length_frames=frames,
            encoded_audio_string=_wav(sound, sample_rate),
            content_type="audio/wav",
        )
        yield Summary.Value(tag=tag, audio=audio)


def text(name: str, value: str) -> Summary.Value:
    """Returns a text, which TensorBoard shows as Markdown under exactly this name."""
    if not isinstance(value, str):
        raise Unwritable("not written: it is not a str")
    # tensorboardX's own adds "/text_summary" to the name and shows a table of one cell.
    tensor = TensorProto(
        dtype="DT_STRING", string_val=[value.encode(errors="replace")], tensor_shape=TensorShapeProto()
    )
    return Summary.Value(tag=name, tensor=tensor, metadata=_plugin("text"))


def histogram(name: str, value: Any, buckets: int | None, note: Note) -> Summary.Value:
    """Returns the distribution of the finite elements of an array of any shape."""
    array = as_array(value)
    if array.dtype.kind == "c":
        raise Unwritable("not written: it is complex; write its real and imaginary parts")
    elements = array.astype(np.float64).reshape(-1)
    if not elements.size:
        raise Unwritable("not written: it is empty")
    finite = elements[np.isfinite(elements)]
    if not finite.size:
        raise Unwritable("not written: it has no finite element")
    if finite.size < elements.size:
        note("written without its NaN and infinite elements")
    try:
        with np.errstate(over="ignore"):
            proto = tbx.make_histogram(finite, bins=buckets or _DEFAULT_BUCKETS)
    except ValueError:
        raise Unwritable("not written: it has no histogram of that many buckets (1 or more)") from None
    return Summary.Value(tag=name, histo=proto)


def tensor(name: str, value: Any, metadata: Any) -> Summary.Value:
    """Returns a raw tensor; `metadata` is a `SummaryMetadata` of any package, its bytes, or None."""
    return Summary.Value(tag=name, tensor=_as_tensor(value), metadata=_as_metadata(metadata))


def pointcloud(name: str, points: Any, colors: Any, config: Any) -> Iterator[Summary.Value]:
    """Yields the coordinates `[N, 3]` or `[B, N, 3]` of a cloud, and its colors where there are some."""
    coordinates = _as_cloud(points)
    shades = None if colors is None else _as_cloud(colors)
    if shades is not None and shades.shape != coordinates.shape:
        raise Unwritable("not written: its colors have another shape than its points")
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError):
        raise Unwritable("not written: its configuration is not JSON") from None
    yield from tbx.mesh(name, coordinates, shades, None, config or {}).value


def hparams(values: Mapping[str, Any]) -> Summary.Value:
    """Returns the start of a session with these hyperparameters.

    There is no experiment summary beside it: with one, TensorBoard's page shows only the metrics listed in
    it; without, it lists those of the run.
    """
    session = SessionStartInfo()
    for name, value in flat_hparams(values).items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    content = HParamsPluginData(session_start_info=session, version=0).SerializeToString()
    nothing = TensorProto(dtype="DT_FLOAT", tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
    return Summary.Value(
        tag="_hparams_/session_start_info", tensor=nothing, metadata=_plugin("hparams", content)
    )


def _plugin(name: str, content: bytes = b"") -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=name, content=content))


def _numbered(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the rows of an array with their names in the log: a single one keeps the name."""
    if len(values) == 1:
        yield name, values[0]
        return
    for index, value in enumerate(values):
        yield f"{name}/{index}", value


def _as_pixels(value: Any, *, rank: int, shapes: str, note: Note) -> np.ndarray:
    """Returns uint8 pixels of rank `rank + 1`, a leading axis added where there is none."""
    array = as_array(value)
    if array.ndim == rank:
        array = array[None]
    if array.ndim != rank + 1 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise Unwritable(f"not written: its shape is not {shapes} with C 1, 3 or 4 and no axis of length 0")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "c":
        raise Unwritable("not written: it is complex")
    if array.dtype.kind == "f":
        return np.rint(_clipped(array, 0.0, 1.0, note) * 255).astype(np.uint8)
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.min() < 0 or array.max() > 255:
        note("integers outside 0..255 were clipped")
    return array.clip(0, 255).astype(np.uint8)


def _clipped(array: np.ndarray, low: float, high: float, note: Note) -> np.ndarray:
    """Returns finite float64 values within the range, NaN as 0."""
    array = array.astype(np.float64)
    if np.isnan(array).any():
        note("NaN was written as 0")
    # Resizing filters overshoot a little: not worth a word.
    slack = 1e-2
    if (array < low - slack).any() or (array > high + slack).any():
        note(f"floats outside [{low:g}, {high:g}] were clipped")
    return np.nan_to_num(array, nan=0.0).clip(low, high)


def _gif(frames: np.ndarray) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        raise Unwritable(f"not written: videos need Pillow; {_MEDIA}") from None
    first, *others = [
        Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in frames
    ]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=_FRAME_MILLISECONDS, loop=0)
    return out.getvalue()


def _wav(samples: np.ndarray, sample_rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def _as_tensor(value: Any) -> TensorProto:
    array = np.asarray(value)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape])
    if array.dtype.kind in "SU" or array.dtype == object:
        if not all(isinstance(item, str | bytes) for item in array.flat):
            raise Unwritable("not written: it holds neither numbers nor strings")
        strings = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
        return TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=strings)
    array = as_array(array)
    if array.dtype.name not in _DTYPES:
        raise Unwritable("not written: TensorBoard has no such dtype")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return TensorProto(dtype=_DTYPES[array.dtype.name], tensor_shape=shape, tensor_content=little.tobytes())


def _as_metadata(metadata: Any) -> SummaryMetadata | None:
    if metadata is None:
        return None
    data = metadata if isinstance(metadata, bytes) else metadata.SerializeToString()
    return SummaryMetadata.FromString(data)


def _as_cloud(value: Any) -> np.ndarray:
    array = as_array(value)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise Unwritable("not written: points and colors have the shape [N, 3] or [B, N, 3]")
    return array.astype(np.float32)
