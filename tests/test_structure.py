"""Rules of the project as tests: imports go down, public names and flags are frozen, nothing shadows or pickles."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import zerolite
from zerolite.medqa import arguments

ROOT = Path(__file__).parent.parent

# A module imports from lines above its own, and from nothing beside or below it but what `BESIDE` names.
LEVELS = [
    [
        "errors",
        "config",
        "runtime.device",
        "shards.layout",
        "runtime.atomic_dir",
        "runtime.cpu_kernels",
        "runtime.chrome_trace",
        "checkpoint.extra_state",
    ],
    ["runtime.trace", "offload.worker_spans"],
    ["runtime.abort", "shards.units", "shards.grad_norm", "offload.arena", "offload.cores", "offload.pool"],
    ["runtime.collectives", "offload.host"],
    ["offload.states"],
    ["offload.host_shard"],
    ["shards.parameters", "shards.gradients", "runtime.mesh", "engine.meta_init", "offload.fetch"],
    ["optim.grad_stats", "engine.loss_scale", "optim.offloaded_states"],
    ["optim.rules"],
    ["optim.base"],
    ["optim.optimizers"],
    ["engine.engine"],
    ["engine.hooks", "runtime.rank_errors", "offload.placement"],
    ["adapters.walk", "adapters.state", "adapters.virtual_tokens", "adapters.prefix", "adapters.presets"],
    ["adapters.layers", "adapters.targets"],
    ["adapters.lora", "adapters.prompts"],
    ["adapters.initial"],
    ["api"],
    ["adapters.lora_files", "adapters.prompt_files", "adapters.merge", "adapters.guards"],
    ["adapters.files"],
    ["adapters.__init__"],
    ["checkpoint.folder", "memory.measure"],
    ["checkpoint.hugging_face"],
    ["__init__"],
]

PUBLIC_NAMES = {
    "Adam", "AdamW", "CheckpointError", "DataError", "Lamb", "Lion", "Offload", "Precision", "Usage", "WorkerError",
    "ZeroliteError", "adapters", "export", "full_params", "load", "load_pretrained", "measure", "no_sync", "save",
    "shard",
}  # fmt: skip

FLAGS = {
    "cutoff_len", "eval_steps", "export", "export_merged", "finetuning_type", "gradient_accumulation_steps",
    "gradient_checkpointing", "learning_rate", "logging_steps", "lora_alpha", "lora_dropout", "lora_rank",
    "lora_target", "loraplus_lr_ratio", "lr_scheduler_type", "max_grad_norm", "max_samples", "max_steps",
    "model_name_or_path", "num_train_epochs", "num_virtual_tokens", "offload", "offload_budget", "offload_parameters",
    "offload_path", "offload_states", "offload_workers", "optim", "output_dir", "per_device_train_batch_size",
    "precision", "prompt_encoder", "prompt_init", "prompt_init_text", "resume", "save_steps", "seed", "skip_invalid",
    "stage", "tokenizer_name_or_path", "train_file", "use_dora", "use_rslora", "validation_file", "warmup_ratio",
    "weight_decay",
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "zerolite").with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Modules of zerolite that a file imports, at any depth, as names below zerolite."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("zerolite.") for alias in node.names if alias.name.startswith("zerolite.")
            }
            found |= {"__init__" for alias in node.names if alias.name == "zerolite"}
        elif isinstance(node, ast.ImportFrom) and node.module == "zerolite":
            for alias in node.names:
                is_module = (ROOT / "zerolite" / f"{alias.name}.py").exists() or (
                    ROOT / "zerolite" / alias.name
                ).is_dir()
                found.add(alias.name if is_module else "__init__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zerolite."):
            module = node.module.removeprefix("zerolite.")
            inside = ROOT / "zerolite" / module.replace(".", "/")
            found |= {f"{module}.{a.name}" if (inside / f"{a.name}.py").exists() else module for a in node.names}
    return found


ENGINE = [
    p for p in sorted((ROOT / "zerolite").rglob("*.py")) if "medqa" not in p.parts and module_name(p) != "__init__"
]
APPLICATION = sorted((ROOT / "zerolite" / "medqa").rglob("*.py"))


@pytest.mark.parametrize("path", ENGINE, ids=module_name)
def test_imports_go_down(path):
    """Every engine module imports only from levels above its own."""
    level_of = {name: level for level, names in enumerate(LEVELS) for name in names}
    name = module_name(path)
    if name.endswith("__init__") and name not in level_of:
        assert not imports_of(path), f"{name} is a docstring, it imports nothing"
        return
    assert name in level_of, f"{name} has no level: place it in LEVELS"
    wrong = [other for other in imports_of(path) if level_of[other] >= level_of[name]]
    assert not wrong, f"{name} (level {level_of[name]}) imports {wrong} from its own level or above"


@pytest.mark.parametrize("path", APPLICATION, ids=module_name)
def test_the_application_uses_public_names_only(path):
    """zerolite.medqa imports zerolite itself and its own modules, nothing inside the engine."""
    foreign = {name for name in imports_of(path) if not name.startswith("medqa")} - {"__init__", *PUBLIC_NAMES}
    assert not foreign, f"{module_name(path)} imports {foreign}"


def test_public_names_are_frozen():
    """The package exports the names of the design and nothing else."""
    assert set(zerolite.__all__) == PUBLIC_NAMES
    assert all(hasattr(zerolite, name) for name in PUBLIC_NAMES)


def test_importing_zerolite_needs_no_triton_and_no_application():
    """The engine can be imported without what only the application or a GPU needs."""
    text = "".join(path.read_text(encoding="utf-8") for path in ENGINE)
    assert not re.search(r"^\s*(import|from) (triton|matplotlib|tqdm|yaml)", text, re.MULTILINE)


def test_the_kernels_folder_shadows_nothing():
    """transformers imports a package called kernels; ours must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "zerolite_kernels" / "__init__.py").exists()


def test_only_device_asks_for_the_device():
    """CUDA is named in device.py alone, but for the groups' transport and where tensors come from."""
    asks = {module_name(p) for p in ENGINE if re.search(r"torch\.cuda|is_cuda", p.read_text(encoding="utf-8"))}
    assert asks == {"runtime.device"}


def test_stage_is_asked_for_in_one_place():
    """Below the engine nothing knows the stage."""
    below = [name for names in LEVELS[: [("engine.engine" in names) for names in LEVELS].index(True)] for name in names]
    for name in below:
        text = (ROOT / "zerolite" / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert not re.search(r"\bself\.stage\b|\bzero\.stage\b|\bstage\s*(<|>|==|!=)", text), (
            f"{name} asks for the stage"
        )


def test_nothing_reads_a_pickle():
    """No checkpoint format of ours, and no reader, can run code."""
    files = [*ENGINE, *APPLICATION, ROOT / "train_medqa.py"]
    text = {path: path.read_text(encoding="utf-8") for path in files}
    found = [
        str(path)
        for path, code in text.items()
        if re.search(r"pickle\.|torch\.load\(|(?<![.\w])eval\(|yaml\.load\(", code)
    ]
    assert not found


def test_flags_are_frozen():
    """A new flag of train_medqa.py is a decision: it is written down here."""
    assert {field.name for field in dataclasses.fields(arguments.Options)} == FLAGS
