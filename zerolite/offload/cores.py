"""Which cores the workers of a rank run on: its share of the affinity mask, one thread a physical core, by node."""

import os
from pathlib import Path


def cores_of(local_rank: int, num_local_ranks: int, num_threads: int | None) -> list[int]:
    """A core for each thread; with None as many threads as there are good cores.

    The cores that this process may run on, ordered by NUMA node, are cut into `num_local_ranks` equal runs, so that a
    rank's threads share a node where they can. `OMP_NUM_THREADS`, which torchrun sets to 1, plays no part.
    """
    allowed = sorted(os.sched_getaffinity(0), key=lambda core: (_node(core), core))
    if len(allowed) >= num_local_ranks:
        cut = [len(allowed) * index // num_local_ranks for index in (local_rank, local_rank + 1)]
        mine = allowed[cut[0] : cut[1]]
    else:
        mine = [allowed[local_rank % len(allowed)]]
    first = {min(_siblings(core) & set(mine)): core for core in mine}
    physical = sorted(first, key=mine.index)
    if num_threads is None:
        # One core, of many two, is left to the trainer, whose Python and autograd feed the device, and to NCCL's proxy.
        return physical[(len(physical) >= 2) + (len(physical) >= 8) :]
    ordered = physical + [core for core in mine if core not in first]
    return [ordered[thread % len(ordered)] for thread in range(num_threads)]


def _node(core: int) -> int:
    nodes = [path.name for path in Path(f"/sys/devices/system/cpu/cpu{core}").glob("node*")]
    return int(nodes[0].removeprefix("node")) if nodes else 0


def _siblings(core: int) -> set[int]:
    """Hardware threads of the same physical core."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return {core}
    siblings: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        siblings |= set(range(int(first), int(last or first) + 1))
    return siblings | {core}
