"""Where a run's model lies: the stage that suits, or with `--auto` the first choice of `zerolite.recommend`."""

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

import zerolite
from zerolite.medqa import model as models
from zerolite.medqa import room, tuning
from zerolite.medqa.arguments import PLACED, Options
from zerolite.medqa.processes import Processes

Adapt = Callable[[nn.Module], object]


def placed(
    options: Options, config: PretrainedConfig, adapt: Adapt | None, ranks: Processes
) -> tuple[Options, str | None]:
    """The options with stage, offload and checkpointing decided, and what to tell about it. Every rank must call it.

    What the user set stays. `auto` becomes False: the options hold what it chose, so that a resumed run keeps it.
    Raises ValueError, the same on every rank, where --auto finds nothing that fits: with the nearest miss.
    """
    if not options.auto:
        stage, why = tuning.stage_of(options, config, ranks)
        return dataclasses.replace(options, stage=stage), why
    free = [min(column) for column in zip(*ranks.gather(*room.free_bytes(options, ranks.device)), strict=True)]
    on_meta = models.on_meta(options, config)
    if adapt is not None:
        adapt(on_meta)
    found = _recommended(options, on_meta, ranks, int(free[0]), int(free[1]))
    best, kept = found.best, [name for name in PLACED if getattr(options, name) is not None]
    beside = f"set beside it, and kept: {', '.join(f'--{name} {getattr(options, name)}' for name in kept)}"
    if best is None:
        nearest = found.candidates[0]
        raise ValueError(
            f"--auto: no configuration fits {_gib(found.device_bytes)} a device and {_gib(free[1])} of host memory a "
            f"rank, of which a twentieth stays free; the nearest is {nearest.name}: {nearest.why}: take fewer rows, a "
            f"smaller --cutoff_len, an adapter, or more devices{f' ({beside})' if kept else ''}"
        )
    chosen = {
        "stage": best.stage,
        "offload": "none" if best.plan.offload is None else "cpu",
        "offload_parameters": best.plan.offload is not None and best.plan.offload.parameters,
        "gradient_checkpointing": bool(best.checkpointing),
    }
    lines = [f"--auto: {' '.join(f'--{name} {value}' for name, value in chosen.items())}"]
    lines += [f"  {line}" for line in _reasons(found)] + ([f"  {beside}"] if kept else [])
    return dataclasses.replace(options, auto=False, **chosen), "\n".join(lines)


def _recommended(options: Options, model: nn.Module, ranks: Processes, device_bytes: int, host_bytes: int):
    """`zerolite.recommend` for this run, with rates measured now. Every rank must call it."""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def recommended(chunked_loss: bool):
        return zerolite.recommend(
            model,
            ranks.world_size,
            device_bytes,
            host_bytes * num_local,
            methods={options.finetuning_type: None},
            stages=[options.stage] if options.stage is not None else range(4),
            offloads=_offloads(options),
            checkpointing=_switches(options),
            precision=zerolite.Precision(models.DTYPES[options.precision], torch.float32),
            optimizer=options.optim,
            batch=options.per_device_train_batch_size,
            length=options.cutoff_len,
            chunked_loss=chunked_loss,
            accumulation=options.gradient_accumulation_steps,
            no_sync=True,
            device=ranks.device.type,
            ranks_per_host=num_local,
            rates="measured",
        )

    try:
        return recommended(True)
    except ValueError:  # of a model whose loss cannot be taken in chunks; whatever else is wrong, is wrong again
        return recommended(False)


def _offloads(options: Options) -> dict[str, zerolite.Offload | None]:
    """What may leave the device, by the names of `zerolite.recommend`; details that the user set hold for each."""
    on_host = dataclasses.replace(options, offload="cpu", offload_parameters=False).placement()
    found: dict[str, zerolite.Offload | None] = {"none": None, "optimizer": on_host}
    if options.offload_budget is None:
        found["parameters"] = dataclasses.replace(on_host, parameters=True)
    if options.offload is not None:
        found = {name: offload for name, offload in found.items() if (name == "none") == (options.offload == "none")}
    if options.offload_parameters is not None:
        found = {
            name: offload for name, offload in found.items() if (name == "parameters") == options.offload_parameters
        }
    return found


def _switches(options: Options) -> tuple[bool, ...]:
    """Of checkpointing: on is for where off does not fit."""
    return (False, True) if options.gradient_checkpointing is None else (options.gradient_checkpointing,)


def _reasons(found) -> list[str]:
    """Lines: what was chosen, what comes next, and which faster ones do not fit."""
    first, *others = str(found).split("\n")
    seconds = found.best.plan.time.total_seconds
    faster = [c for c in found.candidates if not c.fits and c.plan.time.total_seconds < seconds]
    lines = (
        [first, f"next: {others[0].strip()}"] if others and found.candidates[1].fits else [first, "nothing else fits"]
    )
    return lines + [f"faster, but {c.name} {c.why}" for c in faster]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
