"""The events of a training step in their order, and the bytes that live between them beside model states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from zerolite.shards.units import UnitPlan


class Event(str, Enum):
    """What has just happened; `unit` of the moment tells where."""

    FORWARD = "forward begins"
    END_FORWARD = "forward has ended"
    LOSS = "the loss is known"
    BACKWARD = "backward begins"
    BACKWARD_AGAIN = "backward begins at another output"
    END_BACKWARD = "backward has ended"
    GRADIENT = "a parameter has its gradient"
    END = "the step's backward has ended"


@dataclass(frozen=True)
class Moment:
    """An event, and what lives from it until the next. Bytes on one rank, without model states."""

    event: Event
    unit: int  # index of the unit plan
    parameter: str  # name, of GRADIENT
    live_bytes: int  # at the event
    peak_bytes: int  # the most from this event to the next
    flops: int  # from this event to the next


@dataclass(frozen=True)
class Profile:
    """The moments of one step in their order; `is_real`: values decided, so it ran on real ones, drawn at random."""

    moments: tuple[Moment, ...]
    is_real: bool = False

    @property
    def flops(self) -> int:
        return sum(moment.flops for moment in self.moments)

    @classmethod
    def without_activations(cls, plans: Sequence[UnitPlan]) -> "Profile":
        """The events alone: forward in the order of units, gradients in the reverse order of registration.

        What a model holds and communicates without activations does not depend on inputs.
        """
        order = range(len(plans))
        moments = [_bare(Event.FORWARD, 0)]
        for unit in order[1:]:
            moments += [_bare(Event.FORWARD, unit), _bare(Event.END_FORWARD, unit)]
        moments += [_bare(Event.END_FORWARD, 0), _bare(Event.LOSS, 0), _bare(Event.BACKWARD, 0)]
        waiting = _gradients(plans[0])  # the head's come before the blocks', the embeddings' behind them
        for unit in reversed(order[1:]):
            own = _gradients(plans[unit])
            first = min(group.position for group in plans[unit].groups)
            moments += [_bare(Event.GRADIENT, 0, name) for position, name in waiting if position > first]
            waiting = [(position, name) for position, name in waiting if position < first]
            moments.append(_bare(Event.BACKWARD, unit))
            moments += [_bare(Event.GRADIENT, unit, name) for _, name in own]
            moments.append(_bare(Event.END_BACKWARD, unit))
        moments += [_bare(Event.GRADIENT, 0, name) for _, name in waiting]
        return cls((*moments, _bare(Event.END, 0)))


def _gradients(plan: UnitPlan) -> list[tuple[int, str]]:
    """(position, name) of the parameters that train, the last first."""
    trainable = [group for group in plan.groups if group.is_trainable]
    return sorted(((g.position + i, name) for g in trainable for i, name in enumerate(g.names)), reverse=True)


def _bare(event: Event, unit: int, parameter: str = "") -> Moment:
    return Moment(event, unit, parameter, 0, 0, 0)


def shifted(moment: Moment, nbytes: int) -> Moment:
    """The same event with so many bytes more alive."""
    return replace(moment, live_bytes=moment.live_bytes + nbytes, peak_bytes=moment.peak_bytes + nbytes)
