"""Makes the pictures of this folder: trains small models on digits and takes TensorBoard's pages as they are.

    python docs/images/make.py

Needs the extras `examples`, `media` and `tensorboard`, and Chromium, of which CHROMIUM names the program.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import flax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from flax import linen as nn
from PIL import Image
from sklearn.datasets import load_digits

import trainkit as tk

HERE = pathlib.Path(__file__).parent
CHROMIUM = os.environ.get("CHROMIUM", "chromium")
# By name of the picture, what comes after the address of TensorBoard, and the size of the window.
PAGES = {
    "images": ("#images", (1300, 700)),
    "text": ("#text", (1300, 500)),
    "hparams": ("#hparams", (2300, 600)),
    "projector": ("data/plugin/projector/projector_binary.html", (1300, 900)),
}
FLAGS = [
    *("--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--disable-background-networking"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--force-device-scale-factor=1"),
]
WIDTH = 1300
"""Pixels of a picture at most."""


class MLP(nn.Module):
    width: int

    def setup(self):
        self.hidden, self.head = nn.Dense(self.width), nn.Dense(10)

    def encode(self, images):
        return nn.relu(self.hidden(images.reshape(len(images), -1)))

    def __call__(self, images):
        return self.head(self.encode(images))


@flax.struct.dataclass
class Metrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Accuracy


class Digits(tk.Trainer):
    metrics = Metrics

    def loss(self, model, batch, ctx):
        logits = model(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"logits": logits, "labels": batch["label"]}


def encode(model, images):
    return model.encode(images)


def train(logdir: pathlib.Path, width: int, rate: float) -> None:
    """One run, with everything in its log that the pictures show."""
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
    training, valid = (
        {"image": images[rows], "label": labels[rows]} for rows in (slice(1200), slice(1200, None))
    )
    valid_data = tk.data.Arrays(valid, batch_size=256)

    def mistakes(info):
        wrong = np.flatnonzero(info.predict(valid_data)["logits"].argmax(-1) != valid["label"])[:3]
        return {
            f"mistakes/{valid['label'][row]}": valid["image"][row].repeat(8, 0).repeat(8, 1) for row in wrong
        }

    def words(info):
        last = info.history.last("eval/accuracy") if "eval/accuracy" in info.history else float("nan")
        return f"epoch **{info.epoch}** with `width={width}`: accuracy so far {last:.3f}"

    def vectors(info):
        shown = slice(400)
        return (
            info.apply(encode, jnp.asarray(valid["image"][shown])),
            valid["label"][shown],
            valid["image"][shown],
        )

    each = tk.Every(epochs=5)
    callbacks = [
        tk.callbacks.ModelSummary(),
        tk.callbacks.ConfusionMatrix(valid_data, every=each),
        tk.callbacks.Images(mistakes, every=each),
        tk.callbacks.Text(words, name="note", every=each),
        tk.callbacks.Embedding(vectors, every=tk.Every(epochs=10), name="digits"),
    ]
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
    trainer = Digits(MLP(width), tx, callbacks=callbacks, logdir=logdir, hparams={"model": {"width": width}})
    trainer.fit(tk.data.Arrays(training, batch_size=64, shuffle=True), epochs=10, eval_data=valid_data)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def take(address: str, size: tuple[int, int], target: pathlib.Path, folder: str) -> None:
    """Takes a page as it is after a while, in 128 colours."""
    raw = pathlib.Path(folder, target.name)
    options = [
        f"--user-data-dir={folder}/profile",
        f"--window-size={size[0]},{size[1]}",
        f"--screenshot={raw}",
    ]
    subprocess.run(
        [CHROMIUM, *FLAGS, *options, "--virtual-time-budget=30000", address],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    picture = Image.open(raw).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH))
    picture.quantize(128).save(target, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        logdir = pathlib.Path(folder, "runs")
        for name, width, rate in (("narrow", 8, 1e-2), ("wide", 64, 1e-2), ("slow", 64, 1e-3)):
            train(logdir / name, width, rate)
        port = free_port()
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port)]
        board = subprocess.Popen(
            [*command, "--load_fast=false"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            for _ in range(60):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"{address}data/plugin/projector/runs").read()
                    break
                except OSError:
                    pass
            time.sleep(5)  # the logs are read after the server answers
            for name, (page, size) in PAGES.items():
                take(address + page, size, HERE / f"{name}.png", folder)
        finally:
            board.terminate()
            board.wait()


if __name__ == "__main__":
    main()
