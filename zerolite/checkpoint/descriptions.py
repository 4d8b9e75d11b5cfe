"""What the manifest says of a model and its optimizer; of a pipeline, what all stages say together."""

import json
from collections.abc import Iterable
from typing import Any

from zerolite.checkpoint.about import dtypes_of, ties_away
from zerolite.checkpoint.slices import buffers_of, saved_names, slots_of
from zerolite.engine.engine import Engine, all_ranks
from zerolite.errors import CheckpointError
from zerolite.optim.base import ShardedOptimizer
from zerolite.runtime.rank_settings import gather_texts

# "parameters" and "buffers": name -> shape; "optimizer": as it describes itself, or None; and what about.py says.
Description = dict[str, Any]


def describe(engine: Engine, optimizer: ShardedOptimizer | None) -> Description:
    """The model of this rank, by the names of its checkpoints."""
    return _together([_own(engine, optimizer)])


def describe_pipeline(engine: Engine, optimizer: ShardedOptimizer | None) -> Description | None:
    """All stages as one model; None where there is one stage. Collective where there are several.

    CheckpointError on every rank where two of their parameters have one name, or their optimizers differ.
    """
    if not engine.mesh.pipeline:
        return None
    texts = sorted(set(gather_texts(all_ranks(engine), json.dumps(_own(engine, optimizer)))))
    return _together(sorted((json.loads(text) for text in texts), key=lambda one: one["stage"]))


def steps_here(engine: Engine, steps: dict[str, int]) -> dict[str, int]:
    """Steps by the parameters' names in this rank's model."""
    return {name: steps[saved] for name, saved in saved_names(engine).items() if saved in steps}


def _own(engine: Engine, optimizer: ShardedOptimizer | None) -> Description:
    names = saved_names(engine)
    described = optimizer.describe() if optimizer is not None else None
    return {
        "stage": [group.rank for group in engine.mesh.pipeline],
        "parameters": [[names[slot.name], list(slot.whole_shape or slot.shape)] for slot in slots_of(engine)],
        "buffers": {names[name]: list(buffer.shape) for name, buffer in buffers_of(engine.model).items()},
        "optimizer": _renamed(described, names) if described is not None else None,
        "dtypes": dtypes_of(engine),
        "ties_away": ties_away(engine),
    }


def _renamed(description: Description, names: dict[str, str]) -> Description:
    groups = [{**group, "params": [names[name] for name in group["params"]]} for group in description["groups"]]
    return {**description, "groups": groups, "steps": {names[n]: step for n, step in description["steps"].items()}}


def _together(stages: list[Description]) -> Description:
    parameters: dict[str, list[int]] = {}
    for name, shape in (entry for stage in stages for entry in stage["parameters"]):
        if name in parameters:
            raise CheckpointError(
                f"two parameters of the pipeline are called {name}, and a checkpoint addresses them by name: name "
                'layers alike on every stage, nn.ModuleDict({"3": layer}) for the fourth of the whole model'
            )
        parameters[name] = shape
    buffers: dict[str, list[int]] = {}
    for name, shape in (entry for stage in stages for entry in stage["buffers"].items()):
        if buffers.setdefault(name, shape) != shape:
            raise CheckpointError(f"the buffer {name} has shape {shape} and {buffers[name]} on two pipeline stages")
    optimizers = [stage["optimizer"] for stage in stages]
    return {
        "parameters": parameters,
        "buffers": buffers,
        "optimizer": _one_optimizer(optimizers),
        "dtypes": {name: dtype for stage in stages for name, dtype in stage["dtypes"].items()},
        "ties_away": [name for stage in stages for name in stage["ties_away"]],
    }


def _one_optimizer(optimizers: list[Description | None]) -> Description | None:
    first = optimizers[0]
    if first is None or len(optimizers) == 1:
        return first
    others = [one for one in optimizers if one is not None]
    told = {json.dumps([one["class"], *map(_hyper, one["groups"])]) for one in others}
    if len(others) < len(optimizers) or len(told) > 1:
        raise CheckpointError(
            "optimizers of pipeline stages differ in class, number of param groups or hyperparameters, and a "
            f"checkpoint has one for the whole model: {sorted(told)}; build them alike, an empty group where needed"
        )
    groups = [
        {**group, "params": _joined(one["groups"][index]["params"] for one in others)}
        for index, group in enumerate(first["groups"])
    ]
    steps = {name: step for one in others for name, step in one["steps"].items()}
    return {**first, "groups": groups, "steps": steps}


def _hyper(group: Description) -> Description:
    return {name: value for name, value in group.items() if name != "params"}


def _joined(lists: Iterable[list[str]]) -> list[str]:
    return [name for one in lists for name in one]
