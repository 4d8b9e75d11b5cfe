"""What a failed collective means, in words: the reason that was published, or what is likely, and who was where."""

import torch.distributed as dist

from zerolite.errors import WorkerError, ZeroliteError
from zerolite.runtime import abort

ADVICE = (
    "other modules, another order of them, or another number of batches or steps. Give every rank as many batches "
    "(DistributedSampler, drop_last=True); evaluate, generate and save on all ranks, or in full_params, which "
    "communicates on entry alone. TORCH_DISTRIBUTED_DEBUG=DETAIL tells which collectives differ"
)


class PeerError(RuntimeError):
    """The transport's error in an exchange with one other rank."""

    def __init__(self, peer: int, error: RuntimeError):
        super().__init__(str(error))
        self.peer = peer  # its rank in the world


class OutOfStepError(RuntimeError):
    """Another rank is at another collective."""


def failure_of(label: str, error: Exception) -> ZeroliteError:
    """The error for a collective that has failed on this rank, and with it on every other: they hear of it.

    A failure that was published before, by a worker or by another rank, is the cause. It waits for it, since a broken
    connection can arrive first, and for the other ranks to tell where they are: together about a second.
    """
    peer, listener = getattr(error, "peer", None), abort.listener()
    if listener is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return ZeroliteError(f"rank {rank}: {label} did not complete{_likely(error, peer, False)}")
    what = f"rank {listener.rank}: {label} did not complete"
    first = None
    if not isinstance(error, OutOfStepError):
        first = listener.heard(until=lambda: peer is not None and listener.has_ended(peer))
    if first is None:
        likely = _likely(error, peer, peer is not None and listener.has_ended(peer))
        first = listener.publish(abort.COLLECTIVE, f"{what}{likely}")
        what += likely
    if first.kind == abort.WORKER:
        return WorkerError(first.message)
    if first.kind == abort.RANK:
        return ZeroliteError(f"{what}: {first.message}")
    cause = "" if first.message == what else f": {first.message}"
    try:
        words = "; ".join(listener.words())
    except RuntimeError:  # the store is gone
        words = ""
    return ZeroliteError(". ".join(filter(None, [f"{what}{cause}", words])))


def _likely(error: Exception, peer: int | None, has_ended: bool) -> str:
    said = str(error).split(". This is typically")[0]  # gloo guesses at length
    if peer is None:
        return f" ({said}). Another rank failed, is stuck, or runs {ADVICE}"
    if has_ended:
        return f": rank {peer} came to the end of its program, or left it by sys.exit ({said}). It ran {ADVICE}"
    if "timeout" in said.lower() or "timed out" in said.lower():
        return (
            f": rank {peer} did not answer within the process group's timeout ({said}). It is stuck, stopped, or runs "
            f"{ADVICE}"
        )
    return (
        f": rank {peer} was killed, ended without a word, or left the process group ({said}): see its output. If it "
        f"came to its end it ran {ADVICE}"
    )
