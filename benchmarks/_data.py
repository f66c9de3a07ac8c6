"""The data and the sizes of the workloads. NumPy only, so that every process may read it.

Real data are read where they are found; elsewhere random ones of the same shapes stand in, which changes no time.
"""

import pathlib
from typing import Any

import numpy as np
from _task import Task

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
"""Where MNIST's test split (IDX) and `tinyshakespeare.txt` are looked for."""

SIZES: dict[str, dict[str, Any]] = {
    "W1": {"batch_size": 64, "tile": 1},
    "W2": {"batch_size": 128, "examples": 10_000},
    "W3": {"batch_size": 64, "examples": 2_048, "image": 32, "width": 16, "blocks": 1, "classes": 10},
    "W4": {"batch_size": 32, "context": 64, "width": 128, "heads": 4, "layers": 2},
    "R50": {"batch_size": 128, "examples": 1_024, "image": 224, "width": 64, "stages": [3, 4, 6, 3]},
}
"""What each workload is, as the tables have it."""

SMALL: dict[str, dict[str, Any]] = {
    "W1": {},
    "W2": {"batch_size": 8, "examples": 64},
    "W3": {"batch_size": 4, "examples": 32, "image": 8, "width": 4},
    "W4": {"batch_size": 4, "context": 8, "width": 16, "heads": 2, "layers": 1},
    "R50": {"batch_size": 2, "examples": 8, "image": 32, "width": 4, "stages": [1]},
}
"""What differs where a script is only tried out."""

DESCRIPTIONS = {
    "W1": "MLP 64-128-10 on digits",
    "W2": "the CNN of Flax's MNIST example",
    "W3": "a small BatchNorm ResNet",
    "W4": "a two-layer transformer on characters",
    "R50": "ResNet-50 in bfloat16, ImageNet's shapes",
}


def task(name: str, *, small: bool = False, data: pathlib.Path = DATA, **options: Any) -> Task:
    """Returns a workload by name, e.g. "W1"; `options` override its sizes."""
    sizes = {**SIZES[name], **(SMALL[name] if small else {}), **options}
    read = {"W1": _digits, "W2": _mnist, "W3": _images, "W4": _text, "R50": _images}[name]
    arrays, source = read(sizes, data)
    if small:
        arrays = {key: leaf[: 4 * sizes["batch_size"]] for key, leaf in arrays.items()}
    return Task(name, arrays, {**sizes, "source": source})


def batches(arrays: dict[str, np.ndarray], batch_size: int, seed: int = 0) -> Any:
    """Yields shuffled batches for ever, those that `tk.data.Arrays(shuffle=True)` gives."""
    size, epoch = len(next(iter(arrays.values()))), 0
    while True:
        for rows in orders(size, batch_size, epoch, seed):
            yield {name: leaf.take(rows, axis=0) for name, leaf in arrays.items()}
        epoch += 1


def orders(size: int, batch_size: int, epoch: int, seed: int = 0) -> list[np.ndarray]:
    """Returns which examples make each batch of one epoch."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    order = np.random.Generator(bits).permutation(size)
    return [order[at : at + batch_size] for at in range(0, size - batch_size + 1, batch_size)]


def _digits(sizes: dict[str, Any], data: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    from sklearn.datasets import load_digits

    held = load_digits()
    images, labels = (held.data / 16).astype(np.float32), held.target.astype(np.int32)
    tiled = {"image": np.tile(images, (sizes["tile"], 1)), "label": np.tile(labels, sizes["tile"])}
    return tiled, "scikit-learn's digits"


def _mnist(sizes: dict[str, Any], data: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    import trainkit as tk

    files = [data / "t10k-images-idx3-ubyte.gz", data / "t10k-labels-idx1-ubyte.gz"]
    count = sizes["examples"]
    if all(file.exists() for file in files):
        images, labels = (tk.data.read_idx(file)[:count] for file in files)
        arrays = {"image": (images[..., None] / 255).astype(np.float32), "label": labels.astype(np.int32)}
        return arrays, "MNIST's test split"
    rng = np.random.default_rng(0)
    images = rng.random((count, 28, 28, 1), np.float32) * (rng.random((count, 28, 28, 1)) < 0.2)
    return {"image": images, "label": rng.integers(0, 10, count).astype(np.int32)}, "random, MNIST's shapes"


def _images(sizes: dict[str, Any], data: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    rng, side = np.random.default_rng(0), sizes["image"]
    shape = (sizes["examples"], side, side, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    if "stages" not in sizes:
        images = (images / 255).astype(np.float32)
    labels = rng.integers(0, sizes.get("classes", 1000), sizes["examples"]).astype(np.int32)
    return {"image": images, "label": labels}, f"random, {side}x{side}"


def _text(sizes: dict[str, Any], data: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    file, source = data / "tinyshakespeare.txt", "Tiny Shakespeare"
    if file.exists():
        codes = np.frombuffer(file.read_bytes(), np.uint8)
    else:
        codes, source = (
            np.random.default_rng(0).integers(32, 97, 1_115_394).astype(np.uint8),
            "random characters",
        )
    vocabulary, tokens = np.unique(codes, return_inverse=True)
    sizes["vocabulary"] = len(vocabulary)
    length = sizes["context"] + 1
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return {"tokens": windows.astype(np.int32)}, source
