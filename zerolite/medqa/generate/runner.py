"""All requests of a plan, some of them at once, until each has its answer or none can be had."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from zerolite.medqa.generate import replies
from zerolite.medqa.generate.endpoint import Endpoint, Lost, Stop
from zerolite.medqa.generate.journal import Answer, Journal
from zerolite.medqa.generate.ledger import CeilingReached
from zerolite.medqa.generate.plan import Plan, Request

MOST_LOST = 10  # requests without an answer in a row, after which nobody is there to be asked


@dataclass
class Outcome:
    """How a run ended."""

    lost: int = 0
    stopped: str = ""  # why before the end of the plan
    is_refused: bool = False  # by a mistake of the user's: the key, the model
    row_of_lost: int = field(default=0, repr=False)


def pending(plan: Plan, requests: Iterable[Request], journal: Journal) -> list[Request]:
    """Requests without an answer, or whose answer is not checked yet."""
    return [one for one in requests if one.id not in journal.answers or _unchecked(plan, one, journal) is not None]


def check_of(plan: Plan, request: Request, answer: Answer) -> tuple[Request, list[int]] | None:
    """The check of an answer to a passage, and the numbers of the items that it is about; None where there is none."""
    found = replies.items(request, answer) if request.passage is not None else ""
    chosen = [] if isinstance(found, str) else [item for item in found if item.conversation is not None]
    if not chosen:
        return None
    pairs = [item.conversation.turns[0] for item in chosen if item.conversation is not None]
    return plan.check(request, pairs), [item.number for item in chosen]


def _unchecked(plan: Plan, request: Request, journal: Journal) -> Request | None:
    found = check_of(plan, request, journal.answers[request.id])
    return None if found is None or found[0].id in journal.answers else found[0]


async def run(
    plan: Plan, requests: list[Request], endpoint: Endpoint, concurrency: int, tell: Callable[[int], None]
) -> Outcome:
    """Ask `requests`, `concurrency` at once. tell: called with the number of answers after each of them."""
    outcome, waiting, num_answers = Outcome(), iter(requests), 0

    async def work() -> None:
        nonlocal num_answers
        for request in waiting:
            if outcome.stopped:
                return
            try:
                if request.id not in endpoint.journal.answers:
                    await endpoint.ask(request)
                if (check := _unchecked(plan, request, endpoint.journal)) is not None:
                    await endpoint.ask(check)
                outcome.row_of_lost = 0
                num_answers += 1
                tell(num_answers)
            except CeilingReached as reached:
                outcome.stopped = outcome.stopped or str(reached)
            except Stop as stop:
                outcome.stopped, outcome.is_refused = str(stop), True
            except Lost as lost:
                outcome.lost += 1
                outcome.row_of_lost += 1
                if outcome.row_of_lost >= MOST_LOST:
                    outcome.stopped = f"the last {outcome.row_of_lost} requests have no answer: {lost}"

    workers = [asyncio.ensure_future(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await endpoint.close()
    return outcome
