"""The lines of `ConsoleWriter`."""

import io

import jax.numpy as jnp
import numpy as np

from trainkit.writers import ConsoleWriter


def test_lines_are_plain():
    stream = io.StringIO()
    writer = ConsoleWriter(stream)
    writer.write_hparams({"lr": 0.1, "model": {"width": 8}})
    writer.write_scalars(10, {"loss": jnp.float32(1 / 3), "count": 1234567, "bad": "x"})
    writer.write_texts(10, {"note": "hello"})
    writer.write_images(10, {"image": np.zeros((2, 4, 4, 3), np.uint8)})
    writer.write_scalars(11, {})
    writer.close()
    assert stream.getvalue().splitlines() == [
        "[hparams] lr=0.1, model.width=8",
        "[step 10] loss=0.333333, count=1234567, bad=x",
        "[step 10] note: hello",
        "[step 10] image: image uint8[2, 4, 4, 3]",
    ]
    assert not stream.closed


def test_the_default_is_the_standard_output_of_the_moment(capsys):
    ConsoleWriter().write_scalars(1, {"loss": 0.5})
    assert capsys.readouterr().out == "[step 1] loss=0.5\n"
