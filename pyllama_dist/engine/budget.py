"""How many rows of prompts a step may have, so that it ends in time for those that decode."""

_WEIGHT = 0.3  # of the latest step in the mean
_SHORT = 0.8  # of the seconds: after a step that took less, the next may have more rows
_LEAST_ROWS = 16  # below, a step's seconds say little about a row's


class StepBudget:
    """Learns what a row of a prompt costs, from the steps that were run.

    A step costs something however few its rows are, so the mean of few rows says too much of each:
    after a short step the next one may have 16 rows more, and so learns what more rows cost.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """A budget.

        Args:
            seconds: that a step should take at most.
            most: rows of prompts in a step, at most.
        """
        self.seconds, self._most = seconds, most
        self._row_seconds: float | None = None  # mean, the latest steps counting most
        self._next = 0  # rows that may be tried after a short step

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows < _LEAST_ROWS:
            return
        self._next = rows + _LEAST_ROWS if seconds < _SHORT * self.seconds else 0
        found = seconds / rows
        before = self._row_seconds
        self._row_seconds = found if before is None else before + _WEIGHT * (found - before)

    def rows(self, decoding: int) -> int:
        """Rows of prompts beside so many that decode: multiples of 16, at least one of them."""
        if self._row_seconds is None:
            return _LEAST_ROWS  # nothing is known yet, so little is risked
        fit = max(int(self.seconds / self._row_seconds), self._next) - decoding
        return max(_LEAST_ROWS, min(self._most, fit // _LEAST_ROWS * _LEAST_ROWS))
