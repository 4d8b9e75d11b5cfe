"""What workers are stepping, and its way back to the device in time for the next forward.

[Note: just-in-time return]
With offload `optimizer.step` sends the workers off and returns. Buckets come back strictly in the order of units, which
is the same on every rank whatever its forward does: before a unit runs, every bucket up to its last one is taken back
(its exchange is a collective), and this unit's alone are waited for; later ones that the workers have finished start
their copies, which communicate nothing. Where ranks exchange what they stepped, the next unit is taken back too, so
that its gather runs behind this one's forward. Other collectives come after all returns. Whoever reads parameters
otherwise waits in the same order, so one rank may read alone, as long as the others go on to their next forward.
"""

from collections import deque
from collections.abc import Iterable


class WayBack:
    """Buckets that are away, in the order of units; a bucket has a `flat` (flat.FlatBucket) and a `unit`."""

    def __init__(self):
        self._away: deque = deque()
        self._readers_done = None

    def send(self, buckets: Iterable, readers_done) -> None:
        """Hide the old values until they are back. readers_done: event behind their last use on the device."""
        self._readers_done = readers_done
        for bucket in buckets:
            bucket.flat.hide()
            self._away.append(bucket)

    def take(self, last: int) -> None:
        """Start the return of every bucket up to unit number `last`, and the copies of those that are stepped."""
        while self._away and self._away[0].unit.index <= last:
            self._away[0].flat.take_back(self._readers_done)
            self._away.popleft()
        for bucket in self._away:
            if not bucket.flat.host.is_done():
                return
            bucket.flat.ascend(self._readers_done)
