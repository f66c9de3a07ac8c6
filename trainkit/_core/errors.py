"""Exceptions of their own kind. Owns their messages; not when they are raised."""


class NonFiniteError(FloatingPointError):
    """A training step gave a number that is not finite.

    Args:
        step: number of the step, the updates completed after it.
        leaf: the first leaf that was not finite, e.g. `loss` or `grads/Dense_0/kernel`.

    Attributes:
        step: as given.
        leaf: as given.

    Example:
        >>> NonFiniteError(57, "loss").step
        57
    """

    def __init__(self, step: int, leaf: str) -> None:
        # Both are the arguments of the exception, so that it can be pickled.
        super().__init__(step, leaf)
        self.step, self.leaf = step, leaf

    def __str__(self) -> str:
        return (
            f"step {self.step} is not finite, and {self.leaf} is the first leaf that is not. trainer.state is the one "
            f"before it. trainer.replay(step={self.step}) runs the step again and names the first module whose output "
            'is not finite; NanGuard("skip") passes over such steps, NanGuard("rollback") returns to a checkpoint.'
        )
