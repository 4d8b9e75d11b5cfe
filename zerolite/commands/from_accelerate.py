"""An `accelerate config` file, or an FSDP section, as the lines that train the same with zerolite."""

from pathlib import Path
from typing import Any

from zerolite.commands import from_deepspeed
from zerolite.commands.recipe import DTYPES, Recipe
from zerolite.foreign import configuration
from zerolite.foreign.configuration import AUTO, IDLE, NONE, Configuration, Key

# FSDP1's names and numbers of a sharding strategy: (stage, whether the mesh is 2-D).
STRATEGIES = {
    "FULL_SHARD": ("3", False), "SHARD_GRAD_OP": ("2", False), "NO_SHARD": ("0", False), "HYBRID_SHARD": ("3", True),
    "HYBRID_SHARD_ZERO2": ("2", True),
    "1": ("3", False), "2": ("2", False), "3": ("0", False), "4": ("3", True), "5": ("2", True),
}  # fmt: skip
MACHINES = (
    'torch.distributed.init_device_mesh("cuda", (NUM_MACHINES, GPUS))'  # replicated over machines, sharded inside
)
KINDS = {
    "DEEPSPEED": "DeepSpeed",
    "FSDP": "FSDP",
    "NO": "one process",
    **dict.fromkeys(("MULTI_GPU", "MULTI_CPU"), "DDP"),
}
TRANSLATED = {
    "zero_stage": "zero_optimization.stage",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
}


def read(config: Configuration, recipe: Recipe, path: Path) -> list[Key]:
    """Fill the recipe; keys of a DeepSpeed file that this one names. ValueError for another kind of run."""
    kind = str(config.get("distributed_type", "FSDP" if config.section("fsdp_config") else "NO")).upper()
    if kind not in KINDS:
        raise ValueError(f"distributed_type: expected DEEPSPEED, FSDP, MULTI_GPU, MULTI_CPU or NO, got {kind}")
    config.use(
        "distributed_type", f"{KINDS[kind]}: see below" if kind in ("DEEPSPEED", "FSDP") else f"{KINDS[kind]}: stage 0"
    )
    recipe.kind = f"an accelerate configuration ({KINDS[kind]})"
    _start(config, recipe)
    _parallelism(config, recipe)
    if kind == "DEEPSPEED":
        return _deepspeed(config, recipe, path)
    if kind == "FSDP":
        read_fsdp(config, recipe)
    else:
        recipe.notes.append("Plain data parallelism is stage 0; stages 1 to 3 need no other line than stage=.")
        for section in ("fsdp_config", "deepspeed_config"):
            for name in config.section(section):
                config.tell(f"{section}.{name}", IDLE, f"distributed_type is {kind}")
    _precision(config, recipe)
    return []


def read_section(config: Configuration, recipe: Recipe) -> None:
    """The `fsdp` and `fsdp_config` of TrainingArguments, or an `fsdp_config` alone."""
    recipe.kind = "an FSDP section"
    read_fsdp(config, recipe)
    _precision(config, recipe)
    recipe.notes.append(
        "An FSDP section says nothing of precision: Precision(...) is that of bf16=True or fp16=True there."
    )


def read_fsdp(config: Configuration, recipe: Recipe) -> None:
    section = "fsdp_config"
    words = str(config.get("fsdp", "")).replace(",", " ").split()
    config.use("fsdp", "stage and offload")
    version = config.get(f"{section}.version", 2 if "fsdp_config.reshard_after_forward" in config.leaves else 1)
    config.use(f"{section}.version", "how reshard_after_forward is meant")
    stage, is_hybrid = _strategy(config, version, words)
    recipe.stage = stage
    if is_hybrid:
        recipe.mesh = MACHINES
        recipe.notes.append("A hybrid strategy is a 2-D mesh: NUM_MACHINES replicas, each sharded over its GPUS.")
    is_offloaded = "offload" in words
    for name in ("offload_params", "cpu_offload"):
        is_on = config.is_on(f"{section}.{name}")
        is_offloaded |= is_on
        config.tell(f"{section}.{name}", IDLE, "it is off")
        if is_on:
            config.use(f"{section}.{name}", "offload= of shard: parameters, gradients and the optimizer, as FSDP does")
    if is_offloaded:
        recipe.is_offloaded = True
        recipe.offload = {"parameters": "True"} if recipe.shards_parameters else {}
    if config.is_on(f"{section}.activation_checkpointing"):
        recipe.setup.append("model.gradient_checkpointing_enable()")
        config.use(f"{section}.activation_checkpointing", "the model's own, before shard")
    else:
        config.tell(f"{section}.activation_checkpointing", IDLE, "it is off")


def _parallelism(config: Configuration, recipe: Recipe) -> None:
    """Replicas and shards are a mesh; a size of 1 is none of its kind, and other kinds have no counterpart."""
    section = "parallelism_config"
    names = {name.removeprefix(f"{section}_"): f"{section}.{name}" for name in config.section(section)}
    for name in names.values():
        if config.get(name) == 1:
            config.tell(name, IDLE, "1 is none")
    replicas, shards = (config.count(names.get(f"dp_{kind}_size", ""), 1) for kind in ("replicate", "shard"))
    for name in ("dp_replicate_size", "dp_shard_size"):
        config.use(names.get(name, ""), "mesh= of shard (replicate x shard)")
    if isinstance(replicas, int) and replicas > 1:
        recipe.mesh = f'torch.distributed.init_device_mesh("cuda", ({replicas}, {shards}))'


def _strategy(config: Configuration, version: Any, words: list[str]) -> tuple[str, bool]:
    """(stage, whether the mesh is 2-D), from whichever key says it."""
    section = "fsdp_config"
    given = config.get(f"{section}.reshard_after_forward")
    is_switch = str(given).lower() in ("true", "false")
    if version == 2 and (is_switch or given is None):
        stage = "2" if str(given).lower() == "false" else "3"
        config.use(f"{section}.reshard_after_forward", f"shard(stage={stage})")
        config.tell(f"{section}.sharding_strategy", IDLE, "FSDP2 reads reshard_after_forward")
        if words and given is None and "shard_grad_op" in words:
            return "2", False
        return stage, False
    for name in ("sharding_strategy", "reshard_after_forward"):
        value = config.get(f"{section}.{name}")
        if value is None:
            continue
        found = STRATEGIES.get(str(value).upper().removeprefix("SHARDINGSTRATEGY.").strip("_"))
        if found is None and not is_switch:
            raise ValueError(f"{name}: expected one of {', '.join(list(STRATEGIES)[:5])}, got {value!r}")
        if found is not None:
            config.use(f"{section}.{name}", f"shard(stage={found[0]}{', mesh=' if found[1] else ''})")
            config.tell(f"{section}.reshard_after_forward", IDLE, "sharding_strategy says it") if name[
                0
            ] == "s" else None
            return found
    for word in words:
        if (found := STRATEGIES.get(word.upper())) is not None:
            return found
    return "3", False


def _deepspeed(config: Configuration, recipe: Recipe, path: Path) -> list[Key]:
    """DeepSpeed's settings as Accelerate writes them, or the file that it names."""
    section = config.section("deepspeed_config")
    file = section.get("deepspeed_config_file")
    mixed = str(config.get("mixed_precision", "no")).lower()
    if file not in (None, "none", ""):
        found = next((one for one in (Path(str(file)), path.parent / str(file)) if one.is_file()), None)
        if found is None:
            raise ValueError(f"deepspeed_config_file: {file} is no file, from here or from the folder of {path}")
        inner = Configuration(configuration.read(found))
        config.use("deepspeed_config.deepspeed_config_file", "its keys are below")
        config.use("mixed_precision", "bf16 and fp16 of the DeepSpeed file")
    else:
        inner = Configuration(_nested({TRANSLATED[name]: section[name] for name in TRANSLATED if name in section}))
    there = set(inner.leaves)
    for kind in ("bf16", "fp16"):
        if mixed == kind and inner.leaves.get(f"{kind}.enabled", AUTO) == AUTO:
            inner.leaves[f"{kind}.enabled"] = True
    from_deepspeed.read(inner, recipe)
    told = {key.name: key for key in inner.keys()}
    if mixed in DTYPES and file is None:
        config.use("mixed_precision", recipe.precision or "parameters keep their dtype")
    _no_precision(config, mixed)
    for name, other in TRANSLATED.items():
        if other in told:
            config.tell(f"deepspeed_config.{name}", told[other].status, told[other].told)
    if file in (None, "none", ""):
        return []
    return [Key(f"{Path(str(file)).name}: {key.name}", *key[1:]) for key in told.values() if key.name in there]


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        *above, last = name.split(".")
        inner = found
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


def _precision(config: Configuration, recipe: Recipe) -> None:
    mixed = str(config.get("mixed_precision", "no")).lower()
    if mixed in ("bf16", "fp16"):
        recipe.precision = f"zerolite.Precision({DTYPES[mixed]}, reduce={DTYPES[mixed]})"
        told = "parameters are cast and reduced in it, as FSDP's policy does"
        is_plain = config.get("distributed_type", "FSDP") != "FSDP"
        if is_plain and mixed == "fp16":  # under autocast it would need a GradScaler in the loop
            recipe.precision = "zerolite.Precision(torch.float16)"
            told = "fp16 parameters on fp32 masters, with a dynamic loss scale; Accelerate keeps fp32 under autocast"
        elif is_plain:
            recipe.precision, recipe.autocast = "", DTYPES[mixed]
            told = "torch.autocast around the forward, as Accelerate does"
        config.use("mixed_precision", told)
    _no_precision(config, mixed)


def _no_precision(config: Configuration, mixed: str) -> None:
    if mixed in ("no", "fp32", "none", "false"):
        config.tell("mixed_precision", IDLE, "parameters keep their dtype")
    elif mixed not in ("bf16", "fp16"):
        config.tell("mixed_precision", NONE, "zerolite computes in fp32, bf16 and fp16")


def _start(config: Configuration, recipe: Recipe) -> None:
    """The torchrun command."""
    machines, ranks = config.count("num_machines", 1), config.count("num_processes")
    if isinstance(machines, int) and machines > 1:
        recipe.num_machines = machines
        recipe.machine_rank = str(config.get("machine_rank", "MACHINE"))
        recipe.address = str(config.get("main_process_ip") or "")
        recipe.port = str(config.get("main_process_port") or "")
        for name in ("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend"):
            config.use(name, "torchrun: --node-rank, --master-addr, --master-port; each machine has its own rank")
    else:
        for name in ("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend"):
            config.tell(name, IDLE, "one machine: torchrun --standalone")
    config.use("num_machines", "torchrun --nnodes" if recipe.num_machines > 1 else "one machine")
    if isinstance(ranks, int) and ranks > 0:
        recipe.num_ranks = str(ranks // recipe.num_machines)
    config.use("num_processes", "torchrun --nproc-per-node, of each machine")
    gpus = config.get("gpu_ids")
    config.tell("gpu_ids", IDLE, "all of them")
    if gpus not in (None, "all"):
        recipe.environment["CUDA_VISIBLE_DEVICES"] = str(gpus)
        config.use("gpu_ids", "CUDA_VISIBLE_DEVICES")
    config.tell("use_cpu", IDLE, "it is off")
    if config.is_on("use_cpu"):
        recipe.environment["CUDA_VISIBLE_DEVICES"] = ""
        config.use("use_cpu", "no GPU is shown to the program, so it trains on the CPU")
