"""What the keys of a DeepSpeed configuration mean: its names and defaults, and values that belong together.

Every function tells what became of its keys; what is made of the values is the caller's.
"""

from typing import NamedTuple

from zerolite.foreign.configuration import AUTO, IDLE, NONE, USED, Configuration
from zerolite.foreign.keys import KNOWN

# DeepSpeed's names, in lower case, and what steps the same. Its "Adam" is AdamW unless adam_w_mode is false.
OPTIMIZERS = {"adam": "AdamW", "adamw": "AdamW", "lamb": "Lamb", "lion": "Lion"}
# Its schedules, and transformers' of the same shape after a linear warm-up.
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine_with_min_lr"}
STAGES = {"0": 0, "1": 1, "2": 2, "3": 3, "0.0": 0, "1.0": 1, "2.0": 2, "3.0": 3}
COMMUNICATED = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "bfp16": "bf16"}
# What a file without gradient_clipping clips at since June 2026 (pull request 8068); before that it did not clip.
CLIPPING = 1.0
SECTION = "zero_optimization"


class Offloaded(NamedTuple):
    """Where a configuration puts its states and parameters: "none", "cpu" or "nvme"."""

    optimizer: str
    parameters: str  # "none" below stage 3, as there
    path: str | None  # the drive's folder, where the optimizer is on "nvme"


def stage(config: Configuration) -> int:
    """ValueError for what is no stage."""
    config.use(SECTION, "the form of DeepSpeed 0.1: true is stage 1")
    given = config.get(f"{SECTION}.stage", int(config.is_on(SECTION)))
    if (found := STAGES.get(str(given))) is None:
        raise ValueError(f"{SECTION}.stage: expected 0, 1, 2 or 3, got {given!r}")
    config.use(f"{SECTION}.stage", f"shard(stage={found})")
    return found


def offload(config: Configuration, shards_parameters: bool) -> Offloaded:
    """ValueError for what is no device."""
    old = {
        name: config.is_on(f"{SECTION}.{name}") for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_params")
    }
    for name, is_on in old.items():
        told = "DeepSpeed's old name of a device cpu" if is_on else "it is off"
        config.tell(f"{SECTION}.{name}", USED if is_on else IDLE, told)
    optimizer = _device(config, "offload_optimizer", old["cpu_offload"])
    parameters = _device(config, "offload_param", old["cpu_offload_param"] or old["cpu_offload_params"])
    name, path = f"{SECTION}.offload_optimizer", None
    if optimizer == "none":
        config.tell(f"{name}.device", IDLE, "nothing is offloaded")
        config.tell(f"{name}.ratio", IDLE, "nothing is offloaded")
    else:
        config.use(f"{name}.device", "Offload(path=)" if optimizer == "nvme" else "offload= of shard")
        _ratio(config, f"{name}.ratio")
    if optimizer == "nvme":
        given = config.get(f"{name}.nvme_path")
        path = str(given) if given not in (None, AUTO) else None
        config.use(f"{name}.nvme_path", "Offload(path=): the moments lie there, masters in memory")
    else:
        config.tell(f"{name}.nvme_path", IDLE, "nothing lies on a drive")
    return Offloaded(optimizer, _parameters(config, parameters, shards_parameters), path)


def _device(config: Configuration, section: str, is_old: bool) -> str:
    name = f"{SECTION}.{section}.device"
    found = str(config.get(name, "cpu" if is_old else "none"))
    if found.lower() not in ("none", "cpu", "nvme", AUTO):
        raise ValueError(f"{name}: expected none, cpu or nvme, got {found!r}")
    return found.lower().replace(AUTO, "none")  # Accelerate answers "auto" itself, by its own settings


def _ratio(config: Configuration, name: str) -> None:
    ratio = config.get(name, 1.0)
    if ratio == AUTO or config.number(name, 1.0) == 1:
        config.tell(name, IDLE, "everything is stepped on the host")
        return
    way_out = 'Offload(budget="20GiB") says in bytes what may stay on each device'
    config.tell(name, NONE, f"{1 - ratio:.0%} of the optimizer stay on the device there: {way_out}")


def _parameters(config: Configuration, device: str, shards_parameters: bool) -> str:
    name = f"{SECTION}.offload_param"
    config.tell(f"{name}.nvme_path", IDLE, "nothing lies on a drive")
    if device == "none":
        config.tell(f"{name}.device", IDLE, "parameters stay on the device")
    elif not shards_parameters:
        config.tell(f"{name}.device", NONE, 'parameters leave the device at "stage": 3 only, as in DeepSpeed')
        return "none"
    elif device == "cpu":
        config.use(f"{name}.device", "Offload(parameters=True)")
    else:
        told = 'parameters lie in host memory ("cpu"), not on a drive; Offload(path=) puts the moments on one'
        config.tell(f"{name}.device", NONE, told)
        config.tell(f"{name}.nvme_path", NONE, told)
    return device


def section_of(config: Configuration, kind: str) -> str:
    """The section of "bf16" or "fp16", which has an old name, too."""
    return "bfloat16" if kind == "bf16" and "bf16.enabled" not in config.leaves else kind


def reduction(config: Configuration) -> str:
    """The dtype of the reduction where the file says one, else ""; of the sum of gradients too, the same here."""
    found = []
    for name, told in (
        ("communication_data_type", "Precision(reduce=)"),
        ("data_types.grad_accum_dtype", "Precision(reduce=): gradients are kept in the dtype they are reduced in"),
    ):
        value = config.get(name)
        if value is None:
            config.tell(name, IDLE, "null is the compute dtype")
        elif str(value) in COMMUNICATED:
            config.use(name, told)
            found.append(COMMUNICATED[str(value)])
        else:
            config.tell(name, NONE, "expected fp32, fp16 or bf16")
    is_mean = config.get("gradient_allreduce_op", "mean") == "mean"
    told = "gradients are the mean" if is_mean else "gradients are the mean: multiply the loss by the number of ranks"
    config.tell("gradient_allreduce_op", IDLE if is_mean else NONE, told)
    return "fp32" if "fp32" in found else found[0] if found else ""


def loss_scale(config: Configuration) -> tuple[int, int]:
    """(power of two that the scale starts at, steps until it grows). ValueError for what are no whole numbers."""
    power, window = (
        default if (value := config.count(name)) is None else value
        for name, default in (("fp16.initial_scale_power", 16), ("fp16.loss_scale_window", 1000))
    )
    if AUTO in (power, window):
        raise ValueError(
            "fp16.initial_scale_power and fp16.loss_scale_window: auto is no value that transformers fills in"
        )
    config.use("fp16.initial_scale_power", f"GradScaler(init_scale=2.0**{power})")
    config.use("fp16.loss_scale_window", f"GradScaler(growth_interval={window})")
    return power, window


def has_16_bit_states(config: Configuration, name: str, is_offloaded: bool, when: bool = True) -> bool:
    """Whether a switch, which means it where it is `when`, asks for 16-bit moments, which the host has."""
    if config.leaves.get(name) is None or config.is_on(name) is not when:
        config.tell(name, IDLE, "moments are fp32")
        return False
    if is_offloaded:
        config.use(name, 'Offload(states="bf16"), with stochastic rounding')
    else:
        config.tell(name, NONE, 'moments on the device are fp32; offloaded ones can be Offload(states="bf16")')
    return is_offloaded


def optimizer(config: Configuration) -> str | None:
    """The name of zerolite's class; None where the file names none, or one without a counterpart."""
    if "optimizer.type" not in config.leaves:
        return None
    given = str(config.get("optimizer.type"))
    name = OPTIMIZERS.get(given.lower())
    if name is None:
        config.tell("optimizer.type", NONE, f"there is no {given}: the optimizers are AdamW, Adam, Lamb and Lion")
        for other in config.section("optimizer.params"):
            if f"optimizer.params.{other}" not in KNOWN:
                config.tell(f"optimizer.params.{other}", NONE, f"it is of {given}")
    elif given.lower() == "adam" and str(config.get("optimizer.params.adam_w_mode", True)).lower() == "false":
        name = "Adam"
        config.use("optimizer.type", "zerolite.Adam: adam_w_mode is false, so decay is L2")
    else:
        also = ': its "Adam" is AdamW' if given.lower() == "adam" else ""
        config.use("optimizer.type", f"zerolite.{name}{also}")
    config.use("optimizer.params.adam_w_mode", f"zerolite.{name}")
    if name == "Lion":
        config.tell("optimizer.params.eps", NONE, "Lion has no eps")
    return name


def schedule(config: Configuration) -> str | None:
    """transformers' name of the schedule; None where the file names none, or one without a counterpart."""
    given = config.get("scheduler.type")
    params = config.section("scheduler.params")
    if given is None:
        config.tell("scheduler.type", IDLE, "the schedule is your program's")
        return None
    if str(given) not in SCHEDULES:
        for name in params:
            config.tell(f"scheduler.params.{name}", NONE, f"it is of {given}")
        config.tell("scheduler.type", NONE, "take one of torch.optim.lr_scheduler or of transformers, in your program")
        return None
    config.use("scheduler.type", f'transformers.get_scheduler("{SCHEDULES[given]}")')
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        starts_at_0 = params.get(name, 0) in (0, AUTO)
        told = "the rate starts at 0" if starts_at_0 else "the rate starts at 0 here"
        config.tell(f"scheduler.params.{name}", IDLE if starts_at_0 else NONE, told)
    if is_warmup_linear(config):
        config.tell("scheduler.params.warmup_type", IDLE, "warm-up is linear")
    else:
        config.tell("scheduler.params.warmup_type", NONE, 'warm-up is linear here: say "linear"')
    return SCHEDULES[given]


def is_warmup_linear(config: Configuration) -> bool:
    """DeepSpeed warms up along a logarithm unless it is told not to."""
    return config.get("scheduler.params.warmup_type", "log") == "linear"
