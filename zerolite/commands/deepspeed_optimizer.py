"""Optimizer and schedule of a DeepSpeed configuration. "Adam" there is AdamW, and defaults are others than ours."""

from typing import Any

from zerolite.commands.configuration import AUTO, IDLE, NONE, Configuration
from zerolite.commands.migrate_keys import KNOWN
from zerolite.commands.recipe import Recipe, source

# DeepSpeed's names, in lower case, and what steps the same. Its "Adam" is AdamW unless adam_w_mode is false.
OPTIMIZERS = {"adam": "AdamW", "adamw": "AdamW", "lamb": "Lamb", "lion": "Lion"}
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


def auto(recipe: Recipe, config: Configuration, name: str, argument: str, what: str) -> str:
    """The source for a value that transformers fills in."""
    recipe.needs_args = True
    config.use(name, f"{what} auto is {argument}")
    return argument


def moments(config: Configuration, recipe: Recipe, name: str, when: bool = True) -> None:
    """16-bit moments, which the host has."""
    if config.leaves.get(name) is None or config.is_on(name) is not when:
        config.tell(name, IDLE, "moments are fp32")
    elif recipe.is_offloaded:
        recipe.offload["states"] = '"bf16"'
        config.use(name, 'Offload(states="bf16"), with stochastic rounding')
    else:
        config.tell(name, NONE, 'moments on the device are fp32; offloaded ones can be Offload(states="bf16")')


def read_optimizer(config: Configuration, recipe: Recipe) -> None:
    clip = config.get("gradient_clipping")
    if clip == AUTO:
        recipe.max_grad_norm = auto(recipe, config, "gradient_clipping", "args.max_grad_norm", "max_grad_norm=:")
    elif clip:
        recipe.max_grad_norm = source(config.number("gradient_clipping"))
        config.use("gradient_clipping", "max_grad_norm= of the optimizer")
    elif "gradient_clipping" not in config.leaves and config.get("optimizer.params.max_grad_norm"):
        pass  # DeepSpeed refuses it there, and it is meant: see below
    elif clip is None and "gradient_clipping" not in config.leaves:
        recipe.max_grad_norm = "1.0"
        recipe.notes.append(
            "gradient_clipping is absent: DeepSpeed clips at 1.0 since June 2026 (pull request 8068), not before: "
            "leave max_grad_norm=1.0 out if yours is older."
        )
    else:
        config.tell("gradient_clipping", IDLE, "0 is no clipping")
    if "optimizer.type" not in config.leaves:
        recipe.notes.append(
            "The file names no optimizer: torch_optimizer is the AdamW or Adam that your program builds; zerolite.like "
            "takes over its param groups."
        )
        return
    given = str(config.get("optimizer.type"))
    name = OPTIMIZERS.get(given.lower())
    if name is None:
        recipe.optimizer = "AdamW"
        config.tell("optimizer.type", NONE, f"there is no {given}: the optimizers are AdamW, Adam, Lamb and Lion")
        for other in config.section("optimizer.params"):
            if f"optimizer.params.{other}" not in KNOWN:
                config.tell(f"optimizer.params.{other}", NONE, f"it is of {given}")
        recipe.notes.append(f"{given} has no counterpart. AdamW stands in its place, and learns otherwise.")
    elif given.lower() == "adam" and str(config.get("optimizer.params.adam_w_mode", True)).lower() == "false":
        name = "Adam"
        config.use("optimizer.type", "zerolite.Adam: adam_w_mode is false, so decay is L2")
    else:
        also = ': its "Adam" is AdamW' if given.lower() == "adam" else ""
        config.use("optimizer.type", f"zerolite.{name}{also}")
    recipe.optimizer = name or "AdamW"
    config.use("optimizer.params.adam_w_mode", f"zerolite.{recipe.optimizer}")
    moments(config, recipe, "optimizer.params.fp32_optimizer_states", when=False)
    _hyperparameters(config, recipe)


def _hyperparameters(config: Configuration, recipe: Recipe) -> None:
    params = config.section("optimizer.params")
    config.tell("optimizer.params.max_grad_norm", IDLE, "0 is no clipping")
    if params.get("max_grad_norm"):
        config.use("optimizer.params.max_grad_norm", "max_grad_norm=; DeepSpeed refuses it here")
        recipe.max_grad_norm = source(config.number("optimizer.params.max_grad_norm"))
    takes = [name for name in ARGUMENTS if not (name == "eps" and recipe.optimizer == "Lion")]
    if "eps" not in takes:
        config.tell("optimizer.params.eps", NONE, "Lion has no eps")
    for name in takes:
        value = params.get(name, DEFAULTS[recipe.optimizer].get(name))
        if value == AUTO:
            recipe.hyper[name] = auto(recipe, config, f"optimizer.params.{name}", ARGUMENTS[name], f"{name}=:")
        elif value is not None:
            recipe.hyper[name] = source(value)
            config.use(f"optimizer.params.{name}", f"{name}= of the optimizer")
    if "weight_decay" not in params and recipe.optimizer in ("AdamW", "Lamb"):
        recipe.notes.append(
            f"weight_decay is absent: DeepSpeed's default is 0 and that of zerolite.{recipe.optimizer} 0.01, so 0 is "
            "written."
        )


def read_schedule(config: Configuration, recipe: Recipe) -> None:
    given = config.get("scheduler.type")
    if given is None:
        config.tell("scheduler.type", IDLE, "the schedule is your program's")
        return
    params = config.section("scheduler.params")
    names = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine_with_min_lr"}
    if str(given) not in names:
        for name in params:
            config.tell(f"scheduler.params.{name}", NONE, f"it is of {given}")
        config.tell("scheduler.type", NONE, "take one of torch.optim.lr_scheduler, on the optimizer as it is")
        return
    config.use("scheduler.type", f'transformers.get_scheduler("{names[given]}")')
    call = {
        "num_warmup_steps": _steps(
            config, recipe, "warmup_num_steps", "args.get_warmup_steps(num_training_steps)", 1000
        )
    }
    if given != "WarmupLR":
        call["num_training_steps"] = _steps(
            config, recipe, "total_num_steps", "num_training_steps", "num_training_steps"
        )
    if given == "WarmupCosineLR":
        rate = params.get("cos_min_ratio", 0.0001)
        config.use("scheduler.params.cos_min_ratio", "min_lr_rate")
        call["scheduler_specific_kwargs"] = f'{{"min_lr_rate": {source(rate)}}}'
    recipe.schedule, recipe.schedule_arguments = names[given], call
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        starts_at_0 = params.get(name, 0) in (0, AUTO)
        told = "the rate starts at 0" if starts_at_0 else "the rate starts at 0 there"
        config.tell(f"scheduler.params.{name}", IDLE if starts_at_0 else NONE, told)
    _peak(config, recipe, params)
    kind = params.get("warmup_type", "log")
    status = IDLE if kind == "linear" else NONE
    config.tell(
        "scheduler.params.warmup_type", status, "warm-up is linear" if status == IDLE else "warm-up is linear there"
    )
    if kind != "linear":
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
        auto(recipe, config, "scheduler.params.warmup_max_lr", "args.learning_rate", "lr=:")
    elif recipe.hyper.get("lr") not in (None, source(peak)):
        recipe.notes.append(
            f"warmup_max_lr {peak} overrules the optimizer's lr {recipe.hyper['lr']} in DeepSpeed: {peak} is written."
        )
    if recipe.optimizer and peak != AUTO:
        recipe.hyper["lr"] = source(peak)
