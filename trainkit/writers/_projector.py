"""The files that TensorBoard's projector reads: vectors, what is known of each, and a list of them.

Owns their layout, and that what is no longer true is taken out. Each set of vectors has a folder,
`projector/<name>/<step>/`, with its entry of the list in it, written last: without one a folder is not complete. The
list, `projector_config.pbtxt`, is made of these; what others wrote into it stays.
"""

import io
import json
import math
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trainkit._core.atomic import write_atomic
from trainkit._core.files import check_regular, make_folder, read_regular, remove

_FOLDER, _LIST, _ENTRY = "projector", "projector_config.pbtxt", "entry.pbtxt"
_FILES = ("tensors.tsv", "metadata.tsv", "sprite.png", _ENTRY)
_BEGIN, _END = "# trainkit: what is between these lines is written anew each time", "# trainkit: end"
_OURS = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_LARGEST_SPRITE = 8192
"""Pixels of a side that a browser's graphics take."""


def write_embedding(
    logdir: pathlib.Path,
    name: str,
    step: int,
    vectors: np.ndarray,
    columns: Mapping[str, Sequence[str]],
    pixels: np.ndarray | None = None,
) -> None:
    """Writes vectors for the projector, which shows them as `name:<step>`; later ones of that name are taken out.

    Args:
        logdir: the run's folder.
        name: of the embedding.
        step: updates completed.
        vectors: float32 `[N, D]`.
        columns: of each vector by name of the column, N strings each.
        pixels: of each vector, uint8 `[N, H, W, 3]`.

    Raises:
        OSError: a file could not be written, or something else lies under its name.
        ImportError: there are images, and Pillow is missing.
    """
    remove_embeddings(logdir, name, after=step - 1)
    place = f"{_FOLDER}/{_quoted(name)}/{step:05d}"
    folder = logdir
    for part in place.split("/"):
        folder = folder / part
        make_folder(folder)
    shown = f"{name}:{step:05d}"
    entry = [f"tensor_name: {_text(shown)}", f"tensor_path: {_text(f'{place}/tensors.tsv')}"]
    entry += [f"tensor_shape: {size}" for size in vectors.shape]
    _write(folder / "tensors.tsv", _numbers(vectors))
    if columns:
        _write(folder / "metadata.tsv", _table(columns))
        entry.append(f"metadata_path: {_text(f'{place}/metadata.tsv')}")
    if pixels is not None:
        sprite, side = _sprite(pixels)
        _write(folder / "sprite.png", sprite)
        image = (
            f"image_path: {_text(f'{place}/sprite.png')} single_image_dim: {side} single_image_dim: {side}"
        )
        entry.append(f"sprite {{ {image} }}")
    _write(folder / _ENTRY, "embeddings {\n" + "".join(f"  {line}\n" for line in entry) + "}\n")
    _write_list(logdir)


def remove_embeddings(logdir: pathlib.Path, name: str | None = None, *, after: int = -1) -> None:
    """Removes the embeddings of later steps, of one name or of all; leaves what others put into the folders.

    Args:
        logdir: the run's folder.
        name: of the embedding; None for all.
        after: the last step that stays.

    Raises:
        OSError: the system refused it.
    """
    later = [folder for folder in _folders(logdir, name) if int(folder.name) > after]
    for folder in later:
        for file in reversed(_FILES):  # the entry first, without which the rest is not listed
            remove(folder / file)
        for emptied in (folder, folder.parent, folder.parent.parent):
            try:
                emptied.rmdir()
            except OSError:
                break
    if later:
        _write_list(logdir)


def _folders(logdir: pathlib.Path, name: str | None = None) -> Iterator[pathlib.Path]:
    """Yields the folders of embeddings, by name and step; through no link."""
    for one in _within(logdir / _FOLDER):
        if name is None or one.name == _quoted(name):
            steps = [folder for folder in _within(one) if folder.name.isdecimal()]
            yield from sorted(steps, key=lambda folder: int(folder.name))


def _within(folder: pathlib.Path) -> list[pathlib.Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _write_list(logdir: pathlib.Path) -> None:
    path = logdir / _LIST
    check_regular(path, missing_ok=True)
    others = _OURS.sub("", read_regular(path).decode()) if path.exists() else ""
    if others and not others.endswith("\n"):
        others += "\n"
    entries = [
        read_regular(folder / _ENTRY).decode() for folder in _folders(logdir) if (folder / _ENTRY).exists()
    ]
    if entries:
        _write(path, f"{others}{_BEGIN}\n{''.join(entries)}{_END}\n")
    elif others:
        _write(path, others)
    else:
        remove(path)


def _write(path: pathlib.Path, content: str | bytes) -> None:
    check_regular(path, missing_ok=True)
    write_atomic(path, content.encode(errors="replace") if isinstance(content, str) else content)


def _quoted(name: str) -> str:
    """Returns the name of a folder for an embedding: one part of a path, and never one that leads upwards."""
    quoted = urllib.parse.quote(name, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # the quotes and escapes are those of protocol buffers, too


def _numbers(vectors: np.ndarray) -> str:
    """Returns one row a vector, each number with as many digits as tell it from other float32."""
    return "".join("\t".join(row.astype(str).tolist()) + "\n" for row in vectors)


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """Returns one row a vector; a head only where there are several columns, as the projector takes it."""
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    head = [names] if len(names) > 1 else []
    return "".join("\t".join(map(_cell, row)) + "\n" for row in [*head, *rows])


def _cell(value: str) -> str:
    # The projector passes over empty lines, and every label after one would be another's.
    return re.sub(r"[\t\r\n\v\f\x85\u2028\u2029]+", " ", value).strip() or "-"


def _sprite(pixels: np.ndarray) -> tuple[bytes, int]:
    """Returns all images in one PNG, row by row, and the side of each: both are square."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            'Embedding: images need Pillow, which is missing: pip install "trainkit[media]".'
        ) from None
    number, height, width, _ = pixels.shape
    across, side = math.ceil(math.sqrt(number)), max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((number, side, side, 3), 255, np.uint8)
    square[:, top : top + height, left : left + width] = pixels
    if across * side > _LARGEST_SPRITE:
        side = max(1, _LARGEST_SPRITE // across)
        square = np.stack([np.asarray(Image.fromarray(one).resize((side, side))) for one in square])
    grid = np.full((across * across, side, side, 3), 255, np.uint8)
    grid[:number] = square
    whole = (
        grid.reshape(across, across, side, side, 3).swapaxes(1, 2).reshape(across * side, across * side, 3)
    )
    out = io.BytesIO()
    Image.fromarray(whole).save(out, "PNG")
    return out.getvalue(), side
