"""A DeepSpeed configuration as the lines that train the same with zerolite."""

from typing import Any

from zerolite.commands.recipe import DTYPES, Recipe, source
from zerolite.foreign import deepspeed
from zerolite.foreign.configuration import AUTO, IDLE, Configuration

# Defaults of its optimizers that are others than ours, so that they are written out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "weight_decay": 0.0},
    "Adam": {"lr": 1e-3, "weight_decay": 0.0},
    "Lamb": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0},
    "Lion": {"lr": 1e-3, "betas": (0.9, 0.999)},
}
ARGUMENTS = {
    "lr": "args.learning_rate",
    "betas": "(args.adam_beta1, args.adam_beta2)",
    "eps": "args.adam_epsilon",
    "weight_decay": "args.weight_decay",
}


def read(config: Configuration, recipe: Recipe) -> None:
    """Fill the recipe; every key that a line is written for, or that has none because of its value, is told."""
    _stage(config, recipe)
    _offload(config, recipe)
    _precision(config, recipe)
    _optimizer(config, recipe)
    _scheduler(config, recipe)
    _batch(config, recipe)


def _auto(recipe: Recipe, config: Configuration, name: str, argument: str, what: str) -> str:
    """The source for a value that transformers fills in."""
    recipe.needs_args = True
    config.use(name, f"{what} auto is {argument}")
    return argument


def _stage(config: Configuration, recipe: Recipe) -> None:
    recipe.stage = str(deepspeed.stage(config))
    name = "zero_optimization.mics_shard_size"
    size = config.get(name, -1)
    if isinstance(size, int) and size > 0:
        recipe.mesh = (
            f'torch.distributed.init_device_mesh("cuda", (torch.distributed.get_world_size() // {size}, {size}))'
        )
        config.use(name, f"a 2-D mesh: shards over {size} ranks, replicated over the rest")
    else:
        config.tell(name, IDLE, "it is off")


def _offload(config: Configuration, recipe: Recipe) -> None:
    found = deepspeed.offload(config, recipe.shards_parameters)
    recipe.is_offloaded = found.optimizer != "none" or found.parameters != "none"
    if found.parameters != "none":
        recipe.offload["parameters"] = "True"
        if found.optimizer == "none":
            recipe.notes.append(
                "DeepSpeed offloads the parameters alone here; Offload(parameters=True) takes gradients and optimizer "
                "states along."
            )
    if found.optimizer == "nvme":
        recipe.offload["path"] = source(found.path or "/local_nvme")


def _precision(config: Configuration, recipe: Recipe) -> None:
    reduce = DTYPES.get(deepspeed.reduction(config), "")
    sections = {kind: deepspeed.section_of(config, kind) for kind in ("bf16", "fp16")}
    enabled = {kind: str(config.get(f"{name}.enabled", False)).lower() for kind, name in sections.items()}
    scaler = ", scaler=scaler" if _scaler(config, recipe, enabled["fp16"]) else ""
    found = {
        "bf16": f"zerolite.Precision(torch.bfloat16, reduce={reduce or DTYPES['bf16']})",
        "fp16": f"zerolite.Precision(torch.float16, reduce={reduce or DTYPES['fp16']}{scaler})",
    }
    autos = [kind for kind in found if enabled[kind] == AUTO]
    for kind in found:
        if enabled[kind] == AUTO:
            _auto(recipe, config, f"{sections[kind]}.enabled", f"args.{kind}", "Precision:")
        elif enabled[kind] == "true":
            recipe.precision = found[kind]
            told = f"Precision({DTYPES[kind]}), reduced in {reduce or DTYPES[kind]} as DeepSpeed does"
            config.use(f"{sections[kind]}.enabled", told)
        else:
            config.tell(f"{sections[kind]}.enabled", IDLE, "it is off")
    if not recipe.precision and autos:
        recipe.precision = " ".join(f"{found[kind]} if args.{kind} else" for kind in autos) + " None"
        recipe.is_choice = True
    if deepspeed.has_16_bit_states(config, "bf16.bf16_optimizer_states", recipe.is_offloaded):
        recipe.offload["states"] = '"bf16"'
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


def _scaler(config: Configuration, recipe: Recipe, enabled: str) -> bool:
    """Whether the scale has rules, which are written as a GradScaler."""
    names = ("initial_scale_power", "loss_scale_window")
    if enabled == "false":
        for name in (*names, "loss_scale", "hysteresis", "min_loss_scale", "consecutive_hysteresis"):
            config.tell(f"fp16.{name}", IDLE, "fp16 is off")
        return False
    power, window = deepspeed.loss_scale(config)
    recipe.scaler = {"init_scale": f"2.0**{power}", "growth_interval": str(window)}
    return True


def _optimizer(config: Configuration, recipe: Recipe) -> None:
    clip = config.get("gradient_clipping")
    if clip == AUTO:
        recipe.max_grad_norm = _auto(recipe, config, "gradient_clipping", "args.max_grad_norm", "max_grad_norm=:")
    elif clip:
        recipe.max_grad_norm = source(config.number("gradient_clipping"))
        config.use("gradient_clipping", "max_grad_norm= of the optimizer")
    elif "gradient_clipping" not in config.leaves and config.get("optimizer.params.max_grad_norm"):
        pass  # DeepSpeed refuses it there, and it is meant: see below
    elif clip is None and "gradient_clipping" not in config.leaves:
        recipe.max_grad_norm = source(deepspeed.CLIPPING)
        recipe.notes.append(
            f"gradient_clipping is absent: DeepSpeed clips at {deepspeed.CLIPPING} since June 2026 (pull request "
            f"8068), not before: leave max_grad_norm={deepspeed.CLIPPING} out if yours is older."
        )
    else:
        config.tell("gradient_clipping", IDLE, "0 is no clipping")
    if "optimizer.type" not in config.leaves:
        recipe.notes.append(
            "The file names no optimizer: torch_optimizer is the AdamW or Adam that your program builds; zerolite.like "
            "takes over its param groups."
        )
        return
    name = deepspeed.optimizer(config)
    if name is None:
        given = config.get("optimizer.type")
        recipe.notes.append(f"{given} has no counterpart. AdamW stands in its place, and learns otherwise.")
    recipe.optimizer = name or "AdamW"
    if deepspeed.has_16_bit_states(config, "optimizer.params.fp32_optimizer_states", recipe.is_offloaded, when=False):
        recipe.offload["states"] = '"bf16"'
    _hyperparameters(config, recipe)


def _hyperparameters(config: Configuration, recipe: Recipe) -> None:
    params = config.section("optimizer.params")
    config.tell("optimizer.params.max_grad_norm", IDLE, "0 is no clipping")
    if params.get("max_grad_norm"):
        config.use("optimizer.params.max_grad_norm", "max_grad_norm=; DeepSpeed refuses it here")
        recipe.max_grad_norm = source(config.number("optimizer.params.max_grad_norm"))
    takes = [name for name in ARGUMENTS if not (name == "eps" and recipe.optimizer == "Lion")]
    for name in takes:
        value = params.get(name, DEFAULTS[recipe.optimizer].get(name))
        if value == AUTO:
            recipe.hyper[name] = _auto(recipe, config, f"optimizer.params.{name}", ARGUMENTS[name], f"{name}=:")
        elif value is not None:
            recipe.hyper[name] = source(value)
            config.use(f"optimizer.params.{name}", f"{name}= of the optimizer")
    if "weight_decay" not in params and recipe.optimizer in ("AdamW", "Lamb"):
        recipe.notes.append(
            f"weight_decay is absent: DeepSpeed's default is 0 and that of zerolite.{recipe.optimizer} 0.01, so 0 is "
            "written."
        )


def _scheduler(config: Configuration, recipe: Recipe) -> None:
    name = deepspeed.schedule(config)
    if name is None:
        return
    params = config.section("scheduler.params")
    call = {
        "num_warmup_steps": _steps(
            config, recipe, "warmup_num_steps", "args.get_warmup_steps(num_training_steps)", 1000
        )
    }
    if name != "constant_with_warmup":
        call["num_training_steps"] = _steps(
            config, recipe, "total_num_steps", "num_training_steps", "num_training_steps"
        )
    if name == "cosine_with_min_lr":
        rate = params.get("cos_min_ratio", 0.0001)
        config.use("scheduler.params.cos_min_ratio", "min_lr_rate")
        call["scheduler_specific_kwargs"] = f'{{"min_lr_rate": {source(rate)}}}'
    recipe.schedule, recipe.schedule_arguments = name, call
    _peak(config, recipe, params)
    if not deepspeed.is_warmup_linear(config):
        recipe.notes.append(
            'DeepSpeed warms up along a logarithm (warmup_type "log", its default); get_scheduler does it linearly.'
        )


def _steps(config: Configuration, recipe: Recipe, name: str, argument: str, default: Any) -> str:
    key = f"scheduler.params.{name}"
    value = config.count(key, default) if key in config.leaves else default
    if value == AUTO:
        recipe.needs_args = True
        config.use(key, f"auto is {argument}")
        return argument
    config.use(key, "of get_scheduler")
    return str(value)


def _peak(config: Configuration, recipe: Recipe, params: dict[str, Any]) -> None:
    """DeepSpeed's schedule sets the rate, whatever the optimizer was given."""
    peak = params.get("warmup_max_lr")
    if peak is None:
        return
    config.use("scheduler.params.warmup_max_lr", "lr= of the optimizer, which the schedule scales")
    if peak == AUTO:
        _auto(recipe, config, "scheduler.params.warmup_max_lr", "args.learning_rate", "lr=:")
    elif recipe.hyper.get("lr") not in (None, source(peak)):
        recipe.notes.append(
            f"warmup_max_lr {peak} overrules the optimizer's lr {recipe.hyper['lr']} in DeepSpeed: {peak} is written."
        )
    if recipe.optimizer and peak != AUTO:
        recipe.hyper["lr"] = source(peak)


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
    if config.is_on("dataloader_drop_last"):
        recipe.loader["drop_last"] = "True"
    config.use("dataloader_drop_last", "drop_last= of the DataLoader")
