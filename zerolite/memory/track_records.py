"""What a tracker keeps: points of the timeline, regions that labels cover, and what each step took."""

from dataclasses import dataclass
from typing import NamedTuple

from zerolite.memory.host_memory import HostUsage
from zerolite.memory.state_bytes import KINDS, PHASES, Peak

OUTSIDE = "outside"  # the phase of everything else: data, evaluation
TRACKED_PHASES = (*PHASES, OUTSIDE)
TRACKED_KINDS = (*KINDS, "other")  # other: what the process had before, and makes outside of the three phases


class Point(NamedTuple):
    """A moment of the timeline."""

    time: int  # ns, as in traces
    phase: str
    bytes_of: tuple[int, ...]  # now, in the order of TRACKED_KINDS
    peak_bytes: int  # the most since the point before

    @property
    def usage(self) -> Peak:
        return named(self.bytes_of)


class Region(NamedTuple):
    """What a label of the trace covers."""

    kind: str
    name: str
    begin: int  # ns
    end: int


@dataclass(frozen=True)
class StepUsage:
    """One step of this rank, from the end of the step before."""

    number: int  # from 1, since tracking began
    seconds: float
    peaks: dict[str, Peak]  # on the device, by phase
    states: dict[str, int]  # on the device, by kind, at the end of the last backward: what `plan.states` says
    host: HostUsage
    end: int  # ns

    @property
    def peak_bytes(self) -> int:
        return max(peak.total_bytes for peak in self.peaks.values())


def named(bytes_of: tuple[int, ...]) -> Peak:
    """Bytes in the order of TRACKED_KINDS, by their names."""
    return Peak(dict(zip(TRACKED_KINDS, bytes_of, strict=True)))


def larger(ones: dict[str, Peak], others: dict[str, Peak]) -> dict[str, Peak]:
    """Of each phase the larger peak, phases in their order."""
    found = {}
    for phase in TRACKED_PHASES:
        both = [peaks[phase] for peaks in (ones, others) if phase in peaks]
        if both:
            found[phase] = max(both, key=lambda peak: peak.total_bytes)
    return found
