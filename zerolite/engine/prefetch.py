"""Which units are gathered next, and walks over a model a unit at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from zerolite.shards.bucket import Bucket, Unit

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine


def neighbour(units: list[Unit], unit: Unit, step: int) -> Unit | None:
    """The unit to prefetch while `unit` runs: the next one (step 1) or, in backward, the previous one (step -1).

    The root is the first unit. In forward nothing is behind the last unit; in backward the root, whose head runs
    first, is followed by the last one.
    """
    index = unit.index + step
    if len(units) == 1 or index == len(units):
        return None
    return units[index]


def unsharded_buckets(engine: Engine, buckets: Iterable[Bucket], *, writeback: bool) -> Iterator[Bucket]:
    """Yield some of the model's buckets one after the other, in the order of units, while readable. Collective.

    One unit is gathered at a time, and freed before the next. writeback: what was written into the parameters before
    the next turn is kept, in this rank's shard and its master; every rank must write the same.
    """
    wanted = set(buckets)
    engine.guard.check()
    engine.fetch()
    for unit in engine.units:
        chosen = [bucket for bucket in unit.buckets if bucket in wanted]
        if not chosen:
            continue
        with engine.mesh.gathering_for("a walk over the model"):
            engine.unshard(unit)
        unit.wait()
        try:
            for bucket in chosen:
                yield bucket
            for bucket in chosen if writeback else ():
                bucket.parameters.absorb_edits()
        finally:
            engine.free(unit)


def gather_all(engine: Engine) -> None:
    """Gather every unit and keep it. Collective."""
    engine.guard.check()
    engine.fetch()
    engine.full_depth += 1
    with engine.mesh.gathering_for("full_params"):
        for unit in engine.units:
            engine.unshard(unit)
    for unit in engine.units:
        unit.wait()


def release_all(engine: Engine, writeback: bool) -> None:
    """Free what `gather_all` has gathered; `writeback`: store what was written into it. Collective."""
    engine.fetch()  # a step inside is no edit
    engine.full_depth -= 1
    if writeback:
        engine.absorb_edits()
    elif engine.full_depth == 0:
        engine.guard.drop_edits()
    for unit in engine.units:
        engine.free(unit)
