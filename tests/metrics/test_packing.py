"""Packed trees come back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainkit.metrics._packing import Packing

TREE = {
    "float": np.array([1.5, -0.0, np.nan, np.inf, 1e-45], np.float32),
    "half": np.array([[1.5, -2.0]], np.float16),
    "brain": np.array([3.0, 1e30], jnp.bfloat16),
    "int": np.array([-(2**31), 2**31 - 1], np.int32),
    "byte": np.array(-7, np.int8),
    "unsigned": np.array([2**32 - 1], np.uint32),
    "bool": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
    "large": np.arange(2000, dtype=np.int32).reshape(2, 1000),
    "complex": np.array(1 + 2j, np.complex64),
}


def layout():
    return Packing.of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_tree_comes_back_bit_for_bit(wrap):
    packing = layout()
    packed = wrap(packing.pack)(TREE)
    assert [part.dtype for part in packed] == [np.uint32, np.complex64, np.int32]
    back = wrap(packing.unpack)(packed)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for name, leaf in TREE.items():
        assert back[name].dtype == leaf.dtype
        assert back[name].shape == leaf.shape
        assert np.asarray(back[name]).tobytes() == leaf.tobytes(), name


def test_the_host_packs_the_same_words():
    packing = layout()
    for device, host in zip(packing.pack(TREE), packing.pack_on_host(TREE), strict=True):
        assert isinstance(host, np.ndarray)
        assert np.asarray(device).tobytes() == host.tobytes()


def test_the_host_unpacks_to_64_bits():
    wide = layout().unpack_wide(layout().pack(TREE))
    kinds = {"f": np.float64, "i": np.int64, "u": np.uint64, "b": np.bool_, "c": np.complex128}
    for name, leaf in TREE.items():
        kind = "f" if name == "brain" else leaf.dtype.kind
        assert wide[name].dtype == kinds[kind], name
        np.testing.assert_array_equal(wide[name], leaf.astype(kinds[kind]))


def test_smaller_leaves_are_broadcast_and_cast_to_the_layout():
    packing = Packing.of({"x": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    back = packing.unpack(packing.pack({"x": np.int32(4)}))
    np.testing.assert_array_equal(back["x"], np.full((2, 3), 4, np.float32))
