"""One call of every method with CLU's shapes and keywords, and the folder's logs read back by TensorBoard."""

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from trainkit.writers import NullWriter

CALLS = {
    "write_summaries": lambda w: w.write_summaries(1, {"raw": np.arange(6.0).reshape(2, 3)}, metadata=None),
    "write_scalars": lambda w: w.write_scalars(1, {"loss": 0.5, "lr": np.float32(0.1)}),
    "write_images": lambda w: w.write_images(1, {"image": np.zeros((2, 4, 5, 3), np.uint8)}),
    "write_videos": lambda w: w.write_videos(1, {"video": np.zeros((1, 2, 4, 5, 3), np.uint8)}),
    "write_audios": lambda w: w.write_audios(1, {"audio": np.zeros((1, 16, 2))}, sample_rate=8000),
    "write_texts": lambda w: w.write_texts(1, {"text": "*hello*"}),
    "write_histograms": lambda w: w.write_histograms(1, {"hist": np.arange(9.0)}, num_buckets={"hist": 3}),
    "write_pointcloud": lambda w: w.write_pointcloud(
        1,
        {"cloud": np.zeros((7, 3))},
        point_colors={"cloud": np.zeros((7, 3), np.uint8)},
        configs={"cloud": {"camera": {"fov": 60}}},
    ),
    "write_hparams": lambda w: w.write_hparams({"lr": 0.1, "model": {"width": 8}}),
    "flush": lambda w: w.flush(),
}


def events(logdir) -> EventAccumulator:
    """Returns everything in a folder's event files."""
    accumulator = EventAccumulator(
        str(logdir), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)
    )
    return accumulator.Reload()


def images(logdir):
    """Images of TensorBoard's log, `{tag: {step: pixels}}`."""
    read = events(logdir)
    return {
        tag: {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in read.Images(tag)}
        for tag in read.Tags()["images"]
    }


def texts(logdir):
    """Texts of TensorBoard's log, `{tag: {step: text}}`; the card that every run has is left out."""
    read = events(logdir)
    tags = [
        tag for tag in read.Tags()["tensors"] if read.SummaryMetadata(tag).plugin_data.plugin_name == "text"
    ]
    return {
        tag: {e.step: make_ndarray(e.tensor_proto).item().decode() for e in read.Tensors(tag)}
        for tag in tags
        if tag != "run"
    }


class Recorder(NullWriter):
    """Keeps the methods called and the scalars got; raises `error` in the method `fails`."""

    def __init__(self, fails="", error=None):
        self.calls = []
        self.scalars = []
        self.fails = fails
        self.error = error

    def __getattribute__(self, name):
        if name.startswith("write_") or name in ("flush", "close"):
            self.calls.append(name)
            if name == self.fails:
                raise self.error
        return super().__getattribute__(name)

    def write_scalars(self, step, scalars):
        self.scalars.append((step, dict(scalars)))
