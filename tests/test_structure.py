"""Rules of the project as tests: levels, names, sizes, one place a question; public names and flags are frozen."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT

import zerolite
from zerolite.medqa import arguments

# A package imports from levels above its own line, never from one beside it. `api` and `__init__` are the face.
LEVELS = [
    ["errors", "config", "version"],
    ["runtime"],
    ["shards"],
    ["offload"],
    ["engine"],
    ["optim"],
    ["api", "checkpoint", "memory", "adapters", "parallel", "foreign"],
    ["__init__"],
    ["integrations", "commands", "cli"],
    ["medqa", "examples", "__main__"],
]

PUBLIC_NAMES = {
    "Adam", "AdamW", "CheckpointError", "DataError", "Lamb", "Lion", "Offload", "Precision", "Usage", "WorkerError",
    "ZeroliteError", "adapters", "compile", "export", "full_params", "like", "load", "load_pretrained", "measure",
    "no_sync", "save", "shard", "Plan", "plan", "recommend", "track",
}  # fmt: skip

FLAGS = {
    "auto", "columns", "cutoff_len", "eval_steps", "export", "export_merged", "finetuning_type",
    "gradient_accumulation_steps",
    "gradient_checkpointing", "learning_rate", "logging_steps", "lora_alpha", "lora_dropout", "lora_rank",
    "lora_target", "loraplus_lr_ratio", "lr_scheduler_type", "max_grad_norm", "max_samples", "max_steps",
    "model_name_or_path", "num_train_epochs", "num_virtual_tokens", "offload", "offload_budget", "offload_parameters",
    "offload_path", "offload_states", "offload_workers", "optim", "output_dir", "per_device_train_batch_size",
    "precision", "prompt_encoder", "prompt_init", "prompt_init_text", "resume", "save_steps", "seed", "skip_invalid",
    "stage", "tokenizer_name_or_path", "train_file", "use_dora", "use_rslora", "validation_file", "warmup_ratio",
    "packing", "template", "val_size", "weight_decay", "early_stopping_patience", "load_best_model_at_end", "report_to",
    "save_total_limit", "image_folder", "freeze_vision_tower",
}  # fmt: skip

# What moves data between ranks: a function that calls one of these says "Collective." in its docstring.
COLLECTIVES = {"all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_gather_scalars", "on_all_ranks"}

# Words that this project once had for what the field names otherwise.
OLD_WORDS = {
    "piece", "pieces", "ascend", "descend", "settle", "agree", "verdict", "facts", "held", "news", "alarm", "zero",
    "republish", "lane", "lanes", "hide", "landed", "launch", "resident_flat", "squares_on_host",
}  # fmt: skip

MAX_CLASS_LINES, MAX_FILE_LINES, MAX_ARGUMENTS, MAX_BOOLEANS = 250, 400, 7, 1

PACKAGE = ROOT / "zerolite"
ENGINE = [path for path in sorted(PACKAGE.rglob("*.py")) if not {"medqa", "examples"} & set(path.parts)]
APPLICATION = sorted((PACKAGE / "medqa").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path, *, for_types: bool = True) -> set[str]:
    """Modules of zerolite that a file imports, at any depth, as names below zerolite; without those for types alone."""
    found: set[str] = set()
    nodes = list(ast.walk(tree_of(path)))
    if not for_types:
        guarded = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        hidden = {id(inner) for guard in guarded for inner in ast.walk(guard)}
        nodes = [node for node in nodes if id(node) not in hidden]
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "zerolite"]
            found |= {name.removeprefix("zerolite").lstrip(".") or "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zerolite":
            module = node.module.removeprefix("zerolite").lstrip(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                path_of_name = PACKAGE / name.replace(".", "/")
                is_module = path_of_name.with_suffix(".py").exists() or path_of_name.is_dir()
                found.add(name if is_module else module or "__init__")
    return found


def level_of(name: str) -> int:
    (level,) = [level for level, packages in enumerate(LEVELS) if name.split(".")[0] in packages]
    return level


@pytest.mark.parametrize("path", ENGINE, ids=module_name)
def test_imports_go_down(path):
    """A module imports from its own package and from lower levels; siblings do not import each other."""
    name = module_name(path)
    package = name.split(".")[0]
    for other in imports_of(path):
        is_own = other.split(".")[0] == package and "." in name
        assert is_own or level_of(other) < level_of(name), f"{name} imports {other}"


def test_packages_have_no_cycles():
    """Inside a package, too, imports at run time have an order."""
    edges = {module_name(path): imports_of(path, for_types=False) for path in [*ENGINE, *APPLICATION]}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", APPLICATION, ids=module_name)
def test_the_application_uses_public_names_only(path):
    """zerolite.medqa imports zerolite itself and its own modules, nothing inside the engine."""
    foreign = {name for name in imports_of(path) if not name.startswith("medqa")} - {"__init__", *PUBLIC_NAMES}
    assert not foreign, f"{module_name(path)} imports {foreign}"


def test_public_names_are_frozen():
    """The package exports the names of the design and nothing else, says its version, and ships its types."""
    assert set(zerolite.__all__) == PUBLIC_NAMES
    assert all(hasattr(zerolite, name) for name in PUBLIC_NAMES)
    assert re.fullmatch(r"\d+\.\d+\.\d+", zerolite.__version__) and (PACKAGE / "py.typed").exists()


def test_importing_zerolite_needs_no_triton_and_no_application():
    """The engine can be imported without what only the application or a GPU needs."""
    text = "".join(path.read_text(encoding="utf-8") for path in ENGINE)
    assert not re.search(r"^\s*(import|from) (triton|matplotlib|tqdm|yaml)", text, re.MULTILINE)


def test_trainers_are_imported_by_their_integrations_alone():
    """`import zerolite` stays light, and needs none of them."""
    text = "".join(path.read_text(encoding="utf-8") for path in ENGINE if "integrations" not in path.parts)
    assert not re.search(r"^\s*(import|from) (accelerate|lightning|trl|ray)\b", text, re.MULTILINE)


def test_the_kernels_folder_shadows_nothing():
    """transformers imports a package called kernels; ours must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "zerolite_kernels" / "__init__.py").exists()


def conditions_of(path: Path) -> Iterator[str]:
    """The source of everything in a file that is decided on."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield ast.unparse(node.test)
        elif isinstance(node, ast.comprehension):
            yield from map(ast.unparse, node.ifs)
        elif isinstance(node, ast.BoolOp):
            yield ast.unparse(node)
        elif isinstance(node, ast.Match):
            yield ast.unparse(node.subject)


def test_only_device_asks_for_the_device():
    """CUDA is named in device.py alone."""
    asks = {module_name(p) for p in ENGINE if re.search(r"torch\.cuda|is_cuda", p.read_text(encoding="utf-8"))}
    assert asks == {"runtime.device"}


def test_nothing_branches_on_the_host_or_the_kind_of_device():
    """Outside offload/, and device.py itself, no condition asks where something lies: shards and devices are values."""
    found = [
        f"{module_name(path)}: {condition}"
        for path in ENGINE
        if module_name(path).split(".")[0] != "offload" and module_name(path) != "runtime.device"
        for condition in conditions_of(path)
        if re.search(
            r"\bhost\b|\bis_on_host\b|\.type\s*[!=]=\s*'|HostShard|DeviceShard|\bCuda\b|\bCpu\b|\bis_cpu\b", condition
        )
    ]
    assert not found


def test_stage_is_asked_for_in_one_place():
    """A `Partition` turns the stage into ranges; nothing else compares it."""
    asks = {
        module_name(path)
        for path in ENGINE
        for condition in conditions_of(path)
        if re.search(r"\bstage\b\s*(<|>|==|!=|in\b|not in\b)", condition)
    }
    expressions = {
        module_name(path)
        for path in ENGINE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Compare) and re.search(r"\bstage\b", ast.unparse(node))
    }
    assert asks | expressions == {"shards.layout"}


def test_notes_resolve():
    """Every `[Note: x]` that is referred to stands at the head of a paragraph, in the file that is named beside it."""
    files = [*PACKAGE.rglob("*.py"), *KERNELS, *(ROOT / "kernels").rglob("*.h"), *(ROOT / "kernels").rglob("*.cpp")]
    homes: defaultdict[str, set[Path]] = defaultdict(set)
    references: list[tuple[Path, str, str | None]] = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"(?:([\w/]+\.\w+),\s+)?\[Note: ([^\]]+)\]", text):
            start = text.rfind("\n", 0, match.start()) + 1
            if match[1] is None and not text[start : match.start()].strip(' "/#*'):
                homes[match[2]].add(path)
            else:
                references.append((path, match[2], match[1]))
    assert references
    for path, note, file in references:
        assert homes[note], f"{path.name} refers to [Note: {note}], which stands nowhere"
        if file is not None:
            assert any(str(home).endswith(file) for home in homes[note]), f"[Note: {note}] is not in {file}"


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_collective_functions_say_so():
    """Who reads a function that communicates learns it from its docstring, or its class's."""
    silent = []
    for path in [*ENGINE, *APPLICATION]:
        if module_name(path) == "runtime.collectives":
            continue  # its head says it of every method
        classes = {
            id(function): ast.get_docstring(node) or ""
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.ClassDef)
            for function in node.body
        }
        for function in functions_of(path):
            called = {
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
            }
            text = (ast.get_docstring(function) or "") + classes.get(id(function), "")
            if called & COLLECTIVES and "ollective" not in text and "very rank must call" not in text:
                silent.append(f"{module_name(path)}.{function.name}")
    assert not silent


def test_no_old_words():
    """Identifiers are the field's words."""
    found = set()
    for path in [*ENGINE, *KERNELS]:
        for node in ast.walk(tree_of(path)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            name = name or (node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else None)
            if isinstance(name, str) and OLD_WORDS & set(re.split(r"_+|(?<=[a-z])(?=[A-Z])", name.lower())):
                found.add(f"{path.relative_to(ROOT)}: {name}")
    allowed = re.compile(r"zero_grad|zero_$|zeros|kernels/.*: (zero|lanes)$|integrations/.*: (zero|Zero[A-Z]\w+)$")
    assert not {name for name in found if not allowed.search(name)}


def test_engine_objects_are_typed():
    """No bare `bucket`, `engine`, `optimizer` or `shard`: the arguments that a reader follows have types."""
    bare = [
        f"{module_name(path)}.{function.name}({argument.arg})"
        for path in ENGINE
        for function in functions_of(path)
        for argument in [*function.args.args, *function.args.kwonlyargs]
        if argument.arg in {"bucket", "engine", "optimizer", "unit", "parameters"} and argument.annotation is None
    ]
    assert not bare


def test_sizes():
    """Constructors with few arguments, classes and files that fit into a head; records (dataclasses) only hold data."""
    wrong = []
    for path in [*ENGINE, *APPLICATION, *KERNELS]:
        name, lines = path.relative_to(ROOT), len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{name}: {lines} lines")
        elif lines > 350:
            print(f"{name}: {lines} lines, the aim is 350")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > MAX_CLASS_LINES:
                wrong.append(f"{name}: class {node.name} has {node.end_lineno - node.lineno + 1} lines")
        if "medqa" in path.parts:
            continue
        for function in functions_of(path):
            if function.name == "__init__":
                given = [*function.args.args, *function.args.kwonlyargs]
                booleans = [a.arg for a in given if a.annotation is not None and ast.unparse(a.annotation) == "bool"]
                if len(given) - 1 > MAX_ARGUMENTS or len(booleans) > MAX_BOOLEANS:
                    wrong.append(f"{name}:{function.lineno}: {len(given) - 1} arguments, booleans {booleans}")
    assert not wrong


def test_nothing_reads_a_pickle():
    """No checkpoint format of ours, and no reader, can run code."""
    found = [
        str(path)
        for path in [*ENGINE, *APPLICATION, ROOT / "train_medqa.py"]
        if re.search(r"pickle\.|torch\.load\(|(?<![.\w])eval\(|yaml\.load\(", path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_flags_are_frozen():
    """A new flag of train_medqa.py is a decision: it is written down here."""
    assert {field.name for field in dataclasses.fields(arguments.Options)} == FLAGS
