"""Which shards the workers have stepped, and their return to the device in time for the next forward.

[Note: just-in-time fetch]
With offload `optimizer.step` hands commands to the workers and returns. Before unit u runs:
1. The fetch of every stepped shard up to u starts, in the order of units. Where ranks exchange what they stepped, a
   fetch is a collective; the order is the same on every rank, whatever its forward does.
2. This stream waits for u's parameters only.
3. For later shards whose workers are done, the H2D copy starts; that communicates nothing.
Where ranks exchange what they stepped, the next unit's fetch starts too, so that its all-gather runs behind this unit's
forward (prefetch). Other collectives come after all fetches. Whoever reads parameters otherwise waits in the same
order, so one rank may read alone, as long as the others go on to their next forward.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from zerolite.shards.states import ParameterState

if TYPE_CHECKING:
    from zerolite.offload.host_shard import HostShard


class FetchQueue:
    """The shards of one engine that workers step; those that are stepped and not fetched, in the order of units."""

    def __init__(self):
        self.shards: list[HostShard] = []
        self.has_failed = False  # a worker has: nothing more can be fetched
        self._stepped: deque[HostShard] = deque()
        self._readers_done = None  # event behind the last use of the old values on the device

    def add(self, shard: HostShard, unit_index: int) -> None:
        shard.unit_index = unit_index
        self.shards.append(shard)

    def push(self, shard: HostShard, readers_done) -> None:
        """Its workers have the commands of a step."""
        self._readers_done = readers_done
        self._stepped.append(shard)

    def fetch_until(self, unit_index: int) -> None:
        """Start the fetch of every stepped shard up to a unit, and the H2D copies of later ones that are done."""
        while self._stepped and self._stepped[0].unit_index <= unit_index:
            self._stepped[0].start_fetch(self._readers_done)
            self._stepped.popleft()
        if self._stepped:
            done = self._stepped[0].host.pool.num_done()
            for shard in self._stepped:
                if shard.memory.fence > done:
                    return
                shard.start_h2d(self._readers_done)

    def synchronize(self, unit_index: int) -> None:
        """Fetch every stepped shard up to a unit, and wait until what stays unsharded is readable."""
        if self._stepped:
            self.fetch_until(unit_index)
        for shard in self.shards:
            parameters = shard.parameters
            if shard.unit_index <= unit_index and parameters.state is ParameterState.GATHERING:
                if parameters.stays_unsharded:
                    parameters.wait()
