"""Whole numbers that change during a training: the batch size, the length of the crops."""

from collections.abc import Sequence


class StepValues:
    """A piecewise constant function of the step.

    Args:
        first: the value from step 0 on.
        changes: steps and the values from them on.
    """

    def __init__(self, first: int, changes: Sequence[Sequence[int]] = ()) -> None:
        self._values = sorted({0: first, **{step: value for step, value in changes}}.items())

    def __call__(self, step: int) -> int:
        """The value at a step."""
        return [value for start, value in self._values if start <= step][-1]

    def total(self, steps: int) -> int:
        """The sum over the first `steps` steps."""
        ends = [start for start, _ in self._values[1:]] + [steps]
        return sum(
            value * max(0, min(end, steps) - start) for (start, value), end in zip(self._values, ends, strict=True)
        )

    def all(self) -> list[int]:
        """The values in order."""
        return [value for _, value in self._values]
