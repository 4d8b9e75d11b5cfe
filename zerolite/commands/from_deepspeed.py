"""A DeepSpeed configuration as the lines that train the same with zerolite."""

from zerolite.commands.configuration import AUTO, IDLE, NONE, USED, Configuration
from zerolite.commands.deepspeed_optimizer import auto, moments, read_optimizer, read_schedule
from zerolite.commands.recipe import DTYPES, Recipe, source

STAGES = {"0": "0", "1": "1", "2": "2", "3": "3", "0.0": "0", "1.0": "1", "2.0": "2", "3.0": "3"}
COMMUNICATED = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "bfp16": "bf16"}


def read(config: Configuration, recipe: Recipe) -> None:
    """Fill the recipe; every key that a line is written for, or that has none because of its value, is told."""
    _stage(config, recipe)
    _offload(config, recipe)
    _precision(config, recipe)
    read_optimizer(config, recipe)
    read_schedule(config, recipe)
    _batch(config, recipe)


def _stage(config: Configuration, recipe: Recipe) -> None:
    config.use("zero_optimization", "the form of DeepSpeed 0.1: true is stage 1")
    given = config.get("zero_optimization.stage", int(config.is_on("zero_optimization")))
    if (found := STAGES.get(str(given))) is None:
        raise ValueError(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {given!r}")
    recipe.stage = found
    config.use("zero_optimization.stage", f"shard(stage={recipe.stage})")
    size = config.get("zero_optimization.mics_shard_size", -1)
    if isinstance(size, int) and size > 0:
        recipe.mesh = (
            f'torch.distributed.init_device_mesh("cuda", (torch.distributed.get_world_size() // {size}, {size}))'
        )
        config.use(
            "zero_optimization.mics_shard_size", f"a 2-D mesh: shards over {size} ranks, replicated over the rest"
        )
    else:
        config.tell("zero_optimization.mics_shard_size", IDLE, "it is off")


def _offload(config: Configuration, recipe: Recipe) -> None:
    section = "zero_optimization"
    old = {
        name: config.is_on(f"{section}.{name}") for name in ("cpu_offload", "cpu_offload_param", "cpu_offload_params")
    }
    for name, is_on in old.items():
        config.tell(
            f"{section}.{name}",
            USED if is_on else IDLE,
            "DeepSpeed's old name of a device cpu" if is_on else "it is off",
        )
    optimizer = str(config.get(f"{section}.offload_optimizer.device", "cpu" if old["cpu_offload"] else "none"))
    is_old = old["cpu_offload_param"] or old["cpu_offload_params"]
    parameters = str(config.get(f"{section}.offload_param.device", "cpu" if is_old else "none"))
    for name, value in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if value.lower() == AUTO:
            config.use(f"{section}.{name}.device", "auto is Accelerate's own answer: nothing is offloaded here")
        elif value.lower() not in ("none", "cpu", "nvme"):
            raise ValueError(f"{section}.{name}.device: expected none, cpu or nvme, got {value!r}")
    is_nvme = optimizer == "nvme"
    if optimizer in ("cpu", "nvme"):
        recipe.is_offloaded = True
        config.use(f"{section}.offload_optimizer.device", "Offload(path=)" if is_nvme else "offload= of shard")
        path = config.get(f"{section}.offload_optimizer.nvme_path")
        if is_nvme:
            recipe.offload["path"] = source(str(path)) if path not in (None, AUTO) else '"/local_nvme"'
            config.use(
                f"{section}.offload_optimizer.nvme_path", "Offload(path=): the moments lie there, masters in memory"
            )
        _ratio(config, recipe)
    else:
        config.tell(f"{section}.offload_optimizer.device", IDLE, "nothing is offloaded")
        config.tell(f"{section}.offload_optimizer.ratio", IDLE, "nothing is offloaded")
    if not is_nvme:
        config.tell(f"{section}.offload_optimizer.nvme_path", IDLE, "nothing lies on a drive")
    _parameters(config, recipe, parameters)


def _ratio(config: Configuration, recipe: Recipe) -> None:
    name = "zero_optimization.offload_optimizer.ratio"
    ratio = config.get(name, 1.0)
    if ratio == AUTO or config.number(name, 1.0) == 1:
        config.tell(name, IDLE, "everything is stepped on the host")
        return
    config.tell(name, NONE, 'a budget in bytes says it: Offload(budget="20GiB") is what may stay on each device')
    recipe.notes.append(
        f"DeepSpeed keeps {1 - ratio:.0%} of the optimizer on the device (ratio {ratio}); here a "
        'budget in bytes decides: replace offload= by zerolite.Offload(budget="20GiB").'
    )


def _parameters(config: Configuration, recipe: Recipe, device: str) -> None:
    name = "zero_optimization.offload_param"
    if device not in ("cpu", "nvme"):
        config.tell(f"{name}.device", IDLE, "parameters stay on the device")
        config.tell(f"{name}.nvme_path", IDLE, "nothing lies on a drive")
        return
    if not recipe.shards_parameters:
        config.tell(f"{name}.device", NONE, "parameters leave the device at stage 3 only, as in DeepSpeed")
        config.tell(f"{name}.nvme_path", IDLE, "parameters stay on the device")
        return
    if not recipe.is_offloaded:
        recipe.notes.append(
            "DeepSpeed offloads the parameters alone here; Offload(parameters=True) takes gradients and optimizer "
            "states along."
        )
    recipe.is_offloaded = True
    recipe.offload = {"parameters": "True", **recipe.offload}
    if device == "nvme":
        config.tell(f"{name}.device", NONE, "parameters lie in host memory, not on a drive: Offload(parameters=True)")
        config.tell(
            f"{name}.nvme_path", NONE, "parameters lie in host memory; Offload(path=) puts the moments on a drive"
        )
        return
    config.use(f"{name}.device", "Offload(parameters=True)")
    config.tell(f"{name}.nvme_path", IDLE, "nothing lies on a drive")


def _precision(config: Configuration, recipe: Recipe) -> None:
    reduce = _reduce(config)
    sections = {"bf16": "bf16" if "bf16.enabled" in config.leaves else "bfloat16", "fp16": "fp16"}  # the old name, too
    enabled = {kind: str(config.get(f"{name}.enabled", False)).lower() for kind, name in sections.items()}
    scaler = ", scaler=scaler" if _scaler(config, recipe, enabled["fp16"]) else ""
    found = {
        "bf16": f"zerolite.Precision(torch.bfloat16, reduce={reduce or DTYPES['bf16']})",
        "fp16": f"zerolite.Precision(torch.float16, reduce={reduce or DTYPES['fp16']}{scaler})",
    }
    autos = [kind for kind in found if enabled[kind] == AUTO]
    for kind in found:
        if enabled[kind] == AUTO:
            auto(recipe, config, f"{sections[kind]}.enabled", f"args.{kind}", "Precision:")
        elif enabled[kind] == "true":
            recipe.precision = found[kind]
            told = f"Precision({DTYPES[kind]}), reduced in {reduce or DTYPES[kind]} as DeepSpeed does"
            config.use(f"{sections[kind]}.enabled", told)
        else:
            config.tell(f"{sections[kind]}.enabled", IDLE, "it is off")
    if not recipe.precision and autos:
        recipe.precision = " ".join(f"{found[kind]} if args.{kind} else" for kind in autos) + " None"
        recipe.is_choice = True
    config.tell("fp16.auto_cast", IDLE, "floating inputs of units are cast always" if recipe.precision else "it is off")
    moments(config, recipe, "bf16.bf16_optimizer_states")
    if config.is_on("torch_autocast.enabled"):
        given = str(config.get("torch_autocast.dtype", "bfloat16")).removeprefix("torch.")
        recipe.autocast = "torch.float16" if given in ("float16", "fp16", "half") else "torch.bfloat16"
        config.use("torch_autocast.enabled", "torch.autocast around the forward")
        if recipe.autocast == DTYPES["fp16"]:
            recipe.notes.append(
                "fp16 under torch.autocast needs a loss scale: take bf16, or zerolite.Precision(torch.float16) instead."
            )
        config.use("torch_autocast.dtype", f"torch.autocast(..., {recipe.autocast})")
    else:
        for name in ("enabled", "dtype", "lower_precision_safe_modules"):
            config.tell(f"torch_autocast.{name}", IDLE, "it is off")
    if not recipe.precision and not recipe.autocast:
        recipe.notes.append("Neither bf16 nor fp16 is on: parameters keep their dtype, and are reduced in it.")


def _reduce(config: Configuration) -> str:
    """The dtype of the reduction where the file says one; of the sum of gradients too, which is the same here."""
    given = config.get("communication_data_type")
    accumulated = config.get("data_types.grad_accum_dtype")
    for name, value in (("communication_data_type", given), ("data_types.grad_accum_dtype", accumulated)):
        if value is not None and str(value) not in COMMUNICATED:
            raise ValueError(f"{name}: expected fp32, fp16 or bf16, got {value!r}")
        config.tell(name, IDLE, "null is the compute dtype")
    if accumulated is not None:
        config.use(
            "data_types.grad_accum_dtype", "Precision(reduce=): gradients are kept in the dtype they are reduced in"
        )
    if given is not None:
        config.use("communication_data_type", "Precision(reduce=)")
    chosen = "fp32" if "fp32" in (given, accumulated) else COMMUNICATED.get(given or accumulated, "")
    return DTYPES.get(chosen, "")


def _scaler(config: Configuration, recipe: Recipe, enabled: str) -> bool:
    """Whether the scale has rules, which are written as a GradScaler."""
    names = ("initial_scale_power", "loss_scale_window")
    if enabled == "false":
        for name in (*names, "loss_scale", "hysteresis", "min_loss_scale", "consecutive_hysteresis"):
            config.tell(f"fp16.{name}", IDLE, "fp16 is off")
        return False
    power, window = config.count("fp16.initial_scale_power", 16), config.count("fp16.loss_scale_window", 1000)
    config.use("fp16.initial_scale_power", f"GradScaler(init_scale=2.0**{power})")
    config.use("fp16.loss_scale_window", f"GradScaler(growth_interval={window})")
    if AUTO in (power, window):
        raise ValueError(
            "fp16.initial_scale_power and fp16.loss_scale_window: auto is no value that transformers fills in"
        )
    recipe.scaler = {"init_scale": f"2.0**{power}", "growth_interval": str(window)}
    return True


def _batch(config: Configuration, recipe: Recipe) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (config.count(name) for name in names)
    if AUTO in (total, micro, steps):
        recipe.needs_args = True
    config.use(
        names[0], "auto is computed from the others" if total == AUTO else "rows of a micro-batch x steps x ranks"
    )
    if micro is not None:
        recipe.loader["batch_size"] = "args.per_device_train_batch_size" if micro == AUTO else str(micro)
        config.use(names[1], f"batch_size={recipe.loader['batch_size']} of the DataLoader")
    if steps is not None:
        recipe.accumulation = "args.gradient_accumulation_steps" if steps == AUTO else str(steps)
        config.use(names[2], "no_sync on all micro-batches but the last, and a division of the loss")
    counts = [value for value in (total, micro, steps if steps is not None else 1)]
    if all(isinstance(value, int) and value > 0 for value in counts):
        if total % (micro * counts[2]):
            raise ValueError(
                f"train_batch_size {total} is no multiple of {micro} rows x {counts[2]} steps, which DeepSpeed refuses"
            )
        recipe.num_ranks = recipe.num_ranks or str(total // (micro * counts[2]))
    config.tell("managed_gradient_accumulation", IDLE, "step() is called by the loop, when it is due")
    is_mean = config.get("gradient_allreduce_op", "mean") == "mean"
    told = "gradients are the mean" if is_mean else "gradients are the mean: multiply the loss by the number of ranks"
    config.tell("gradient_allreduce_op", IDLE if is_mean else NONE, told)
    if config.is_on("dataloader_drop_last"):
        recipe.loader["drop_last"] = "True"
    config.use("dataloader_drop_last", "drop_last= of the DataLoader")
