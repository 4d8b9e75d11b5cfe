"""Names of its own for each attempt of a torchrun that starts ranks again, on one machine or several.

[Note: names of an attempt]
The agent's store outlives the ranks, and torch's names in it are the same for every attempt: a rank would read where
one of the last attempt listened, and wait for it. No number that ranks are given tells attempts apart: machines count
theirs alone, and one that joins late counts from 0. So rank 0 draws a name, and the others ask for it by a number that
they draw, which no answer of before bears. Who asked in an attempt that is over gets an answer that nobody reads.
"""

import datetime
import os
import secrets
import time
from typing import Any

import torch.distributed as dist

from zerolite.errors import ZeroliteError

QUESTIONS, ANSWERS, JOINED = "zerolite/questions", "zerolite/answers", "joined"
LOOK_SECONDS = 0.01


def own_names(timeout: datetime.timedelta) -> dict[str, Any]:
    """Of `init_process_group`: a store where nothing of another attempt stands, where the agent has it. Collective."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = _give_name(store, world_size, timeout) if rank == 0 else _ask_name(store)
    return {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": world_size}


def _ask_name(store: dist.Store) -> str:
    question = secrets.token_hex(8)
    store.set(f"{QUESTIONS}/{store.add(QUESTIONS, 1)}", question)
    name = store.get(f"{ANSWERS}/{question}").decode()  # waits
    store.add(f"{name}/{JOINED}", 1)
    return name


def _give_name(store: dist.Store, world_size: int, timeout: datetime.timedelta) -> str:
    """Answer who asks until all ranks have the name. ZeroliteError where that takes too long."""
    name, last, unanswered = f"attempt {secrets.token_hex(8)}", 0, []
    deadline = time.monotonic() + timeout.total_seconds()
    while (joined := store.add(f"{name}/{JOINED}", 0)) < world_size - 1:
        newest = store.add(QUESTIONS, 0)
        unanswered += [f"{QUESTIONS}/{number}" for number in range(last + 1, newest + 1)]
        for key in [key for key in unanswered if store.check([key])]:  # a rank may have died before it asked
            store.set(f"{ANSWERS}/{store.get(key).decode()}", name)
            unanswered.remove(key)
        last = newest
        if time.monotonic() > deadline:
            raise ZeroliteError(
                f"{world_size - 1 - joined} of {world_size} ranks did not start in {timeout.total_seconds():.0f} s: "
                "look at what the other machines print"
            )
        time.sleep(LOOK_SECONDS)
    return name
