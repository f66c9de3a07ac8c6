"""The program in a file, and which calls out of it are known. Owns what is believed of a program; runs none."""

import re
from collections.abc import Mapping

import jax
import jax.export

KNOWN_CALLS = frozenset(
    {
        # Shapes, shardings and buffers.
        "shape_assertion",
        "AllocateBuffer",
        "annotate_device_placement",
        *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"),
        *(
            f"stablehlo.dynamic_{name}"
            for name in ("approx_top_k", "reduce_window", "rng_bit_generator", "top_k")
        ),
        # Random numbers and sorting.
        *("cu_threefry2x32_ffi", "hip_threefry2x32_ffi", "ApproxTopK"),
        # Linear algebra: on CPUs of LAPACK, of each of four precisions; on GPUs of CUDA and ROCm; on TPUs of XLA.
        *(
            f"lapack_{precision}{name}_ffi"
            for name in ("potrf", "geqrf", "geev", "gesdd", "getrf", "gehrd", "gees", "trsm", "gtsv")
            for precision in "sdcz"
        ),
        *(f"lapack_{name}_ffi" for name in ("sorgqr", "dorgqr", "cungqr", "zungqr")),
        *(f"lapack_{name}_ffi" for name in ("ssyevd", "dsyevd", "cheevd", "zheevd")),
        *(f"lapack_{name}_ffi" for name in ("ssytrd", "dsytrd", "chetrd", "zhetrd")),
        *(
            f"{library}_{name}_ffi"
            for library in ("cusolver", "hipsolver")
            for name in ("getrf", "geqrf", "orgqr", "potrf", "syevd", "gesvd", "gesvdj", "sytrd")
        ),
        *("hipsolver_gesdd_ffi", "cusparse_gtsv2_ffi"),
        *("cu_lu_pivots_to_permutation", "hip_lu_pivots_to_permutation"),
        *("Eigh", "Qr", "ProductOfElementaryHouseholderReflectors", "LuDecomposition"),
        # Kernels of Pallas, which run on the accelerator.
        *("tpu_custom_call", "mosaic_gpu_v2"),
    }
)
"""Targets of custom calls that programs exported by JAX have: those whose stability JAX guarantees, except for
TensorFlow functions. Above all no call back into Python is among them, which names a function of the process that wrote
the file by its number, and ends another process."""

_CALL = re.compile(r"stablehlo\.custom_call\b(?: @(?:\"((?:[^\"\\]|\\.)*)\"|([\w$.-]+)))?")
_WAITS = re.compile(r"\b(?:stablehlo|mhlo)\.(infeed|outfeed|send|recv)\b")


def read_program(content: bytes, versions: Mapping[str, str]) -> jax.export.Exported:
    """Returns the program that `jax.export` wrote.

    Args:
        content: what it wrote.
        versions: of the packages it says it was written with, by name.

    Raises:
        ValueError: this JAX can't read it, or it calls something that is not among `KNOWN_CALLS`.
    """
    try:
        program = jax.export.deserialize(bytearray(content))
        text = program.mlir_module()
    except Exception as error:  # of a file by another JAX, or by none, any
        raise ValueError(
            f"written with {versions}, and jax {jax.__version__} cannot read its program ({type(error).__name__}: "
            f"{str(error)[:200]}); a jax at most some months away from that one can"
        ) from error
    if program.has_vjp():
        raise ValueError("its program has a gradient beside it, which tk.export does not write")
    unknown = sorted(calls_of(text) - KNOWN_CALLS)
    if unknown:
        raise ValueError(
            f"its program calls {', '.join(repr(name[:60]) for name in unknown)}, which no model exported by "
            "tk.export does, and is not run"
        )
    return program


def calls_of(text: str) -> set[str]:
    """Returns what a program in StableHLO calls that is not in it; "" where a target can't be made out."""
    called = {quoted or bare for quoted, bare in _CALL.findall(text)}
    return called | set(_WAITS.findall(text))
