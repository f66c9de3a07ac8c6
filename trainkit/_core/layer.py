"""`Layer`: what is known of one module of a model without running it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of a model, without the modules in it.

    Attributes:
        path: names of the modules down to it, `encoder/Dense_0`; "" for the model itself.
        kind: its class, "" where it was not called.
        calls: how often it was called in one evaluation of a batch.
        inputs: shapes and dtypes of the arrays that it was first called with, as it sees them.
        outputs: of what it returned then.
        parameters: number of elements of its own parameters.
        bytes: of these.
        bytes_per_device: those that one device holds.
        sharding: how they lie on the devices; "whole" where each holds all.
        flops: operations on floats of its calls for one batch, two for a multiply-add; None where that is not known.
    """

    path: str
    kind: str = ""
    calls: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0
    bytes_per_device: int = 0
    sharding: str = ""
    flops: int | None = None
