"""Where a trainer stands in its data. Owns the numbers; what moves them is the loop."""

import dataclasses


@dataclasses.dataclass
class Position:
    """Where a trainer stands in its data: kept between fits.

    Attributes:
        epoch: passes over the training source begun.
        batch: batches of the running pass already used; 0 between passes.
        rows: of a full batch, as far as is known: a pass gone on with at a smaller one pads it alike.
    """

    epoch: int = 0
    batch: int = 0
    rows: int = 0
