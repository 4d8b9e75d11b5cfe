"""Which backwards a model has had since the last step: every rank must have the same, inside no_sync and outside."""

NUM_TOLD = 8  # backwards that an error tells one by one


class BackwardRecord:
    """Compared over ranks by every step; its gradients' clearing clears it."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.order_hash = 0  # of how each ended, in order
        self._first: list[str] = []
        self._num_reduced = self._num_unreduced = 0

    def add(self, is_reduced: bool) -> None:
        """A backward has ended; `is_reduced`: outside of no_sync."""
        self.order_hash = (31 * self.order_hash + 1 + is_reduced) % (1 << 48)
        self._num_reduced += is_reduced
        self._num_unreduced += not is_reduced
        if len(self._first) < NUM_TOLD:
            self._first.append("reduced" if is_reduced else "inside no_sync")

    def __str__(self) -> str:
        if not self._first:
            return "none"
        dots = ", ..." if self._num_reduced + self._num_unreduced > len(self._first) else ""
        return f"{self._num_reduced} reduced, {self._num_unreduced} inside no_sync ({', '.join(self._first)}{dots})"
