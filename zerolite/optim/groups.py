"""Which parameters an optimizer steps, and in which group: anybody may add to `param_groups`, move in it or remove."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch

from zerolite.engine.engine import Engine, ParameterInfo, sharded_info
from zerolite.optim.hyperparameters import check_hyperparameters
from zerolite.shards.bucket import Bucket


class Groups:
    """What `param_groups` was when it was last looked at."""

    def __init__(self):
        self.engine: Engine | None = None  # of the parameters
        self.infos: dict[torch.nn.Parameter, ParameterInfo] = {}  # of the parameters that are stepped
        self.group_of: dict[torch.nn.Parameter, int] = {}  # of those
        self._parameters: list[list[torch.nn.Parameter]] = []  # of each group, the frozen ones too

    def are(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups have the parameters that they had."""
        now = [group["params"] for group in param_groups]
        if list(map(len, now)) != list(map(len, self._parameters)):
            return False
        return all(map(is_, chain.from_iterable(now), chain.from_iterable(self._parameters)))

    def read(self, param_groups: Sequence[dict[str, Any]]) -> "Groups":
        """The groups as they are now.

        ValueError for numbers of a new group that are out of their range, and for a parameter in two groups, of no
        sharded model, of another one, or unfrozen after sharding.
        """
        for group in param_groups[len(self._parameters) :]:
            check_hyperparameters(group["lr"], group["betas"], group.get("eps", 0.0), group["weight_decay"])
        now = Groups()
        now._parameters = [list(group["params"]) for group in param_groups]
        group_of = {parameter: index for index, group in enumerate(now._parameters) for parameter in group}
        if len(group_of) < sum(map(len, now._parameters)):
            raise ValueError("some parameters appear in more than one parameter group, or twice in one")
        engine = self.engine
        for parameter, index in group_of.items():
            info = sharded_info(parameter)
            engine = engine or info.engine
            if info.engine is not engine:
                raise ValueError("the parameters belong to two sharded models: build one optimizer for each")
            if info.bucket.gradients is None:
                if parameter.requires_grad:
                    raise ValueError(
                        f"{info.name} was frozen when the model was sharded and requires a gradient now: "
                        "set requires_grad before zerolite.shard"
                    )
                continue  # frozen parameters are in their group as in torch, and never stepped
            now.infos[parameter], now.group_of[parameter] = info, index
        now.engine = engine
        return now

    def slots(self) -> dict[Bucket, list[int]]:
        """Of the parameters that are stepped."""
        slots: dict[Bucket, list[int]] = {}
        for info in self.infos.values():
            slots.setdefault(info.bucket, []).append(info.index)
        return slots
