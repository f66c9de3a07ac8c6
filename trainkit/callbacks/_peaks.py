"""How many operations a second devices are built for. Owns the table, and nothing measured."""

PEAKS = (
    ("NVIDIA GB200", 2.5e15),
    ("NVIDIA B200", 2.25e15),
    ("NVIDIA H200", 9.89e14),
    ("NVIDIA H100 PCIe", 7.56e14),
    ("NVIDIA H100 NVL", 8.35e14),
    ("NVIDIA H100", 9.89e14),
    ("NVIDIA GH200", 9.89e14),
    ("NVIDIA A100", 3.12e14),
    ("NVIDIA A30", 1.65e14),
    ("NVIDIA A10G", 7.0e13),
    ("NVIDIA A10", 1.25e14),
    ("NVIDIA L40S", 3.62e14),
    ("NVIDIA L4", 1.21e14),
    ("Tesla V100", 1.25e14),
    ("Tesla T4", 6.5e13),
    ("TPU v6 lite", 9.18e14),
    ("TPU v5 lite", 1.97e14),
    ("TPU v5", 4.59e14),
    ("TPU v4", 2.75e14),
    ("TPU v3", 6.15e13),
    ("TPU v2", 2.25e13),
)
"""Dense peak in FLOP/s of one JAX device by the beginning of its `device_kind`; the first that fits counts.

In bfloat16, or float16 where a device has no bfloat16 (V100, T4), without sparsity: the convention of MFU (Chowdhery
et al. 2022, PaLM, appendix B), for float32 too. NVIDIA: data sheets of the products, half of the figure where it is
stated with sparsity. TPU: "System architecture" pages of Cloud TPU, per chip, halved for v2 and v3, where a JAX device
is one of two cores.
"""


def peak_of(device_kind: str) -> float | None:
    """Returns the peak of a device in FLOP/s, None where it is not known."""
    return next((peak for name, peak in PEAKS if device_kind.startswith(name)), None)
