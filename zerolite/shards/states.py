"""The states of a bucket and the transitions between them, as data.

    parameters   SHARDED      the unsharded buffer is freed (stage 3); reads give NaN
                 GATHERING    an all-gather, or the H2D copy of stepped values, is in flight
                 UNSHARDED    readable
                 STALE        workers are stepping, or have stepped, what stays unsharded; reads give NaN
    shard        IDLE         nothing is queued; a shard on the device is never anything else
                 STEPPING     its workers have the commands of a step
                 FETCHING     the H2D copy of what they stepped is in flight

At any time `sharded + gathering + unsharded + stale == buckets`.
"""

from enum import Enum

from zerolite.errors import ZeroliteError


class ParameterState(str, Enum):
    SHARDED = "SHARDED"
    GATHERING = "GATHERING"
    UNSHARDED = "UNSHARDED"
    STALE = "STALE"


class ShardState(str, Enum):
    IDLE = "IDLE"
    STEPPING = "STEPPING"
    FETCHING = "FETCHING"


_P, _S = ParameterState, ShardState
LEGAL = {
    (_P.SHARDED, _P.GATHERING),  # unshard
    (_P.GATHERING, _P.UNSHARDED),  # wait
    (_P.UNSHARDED, _P.SHARDED),  # reshard
    (_P.UNSHARDED, _P.GATHERING),  # publish: ranks exchange what they stepped here
    (_P.UNSHARDED, _P.STALE),  # publish: workers step
    (_P.STALE, _P.GATHERING),  # fetch
    (_S.IDLE, _S.STEPPING),  # step
    (_S.STEPPING, _S.FETCHING),  # fetch
    (_S.FETCHING, _S.IDLE),  # fetched, or handed to the all-gather behind it
}


def illegal(before: Enum, after: Enum, bucket: str) -> ZeroliteError:
    """The error for a transition that the table does not have; `bucket` is its name."""
    return ZeroliteError(
        f"bucket {bucket} goes from {before.name} to {after.name}, which no transition allows: this is a bug of "
        "zerolite, please report it with the script that shows it"
    )
