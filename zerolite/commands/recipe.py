"""The lines that a run is written with: what to call with which arguments, as Python source."""

import json
import shlex
import textwrap
from dataclasses import dataclass, field

DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
WIDTH = 100


@dataclass
class Recipe:
    """Arguments by name, each as source text; empty where the default is meant."""

    kind: str  # of the configuration that was read
    stage: str = "0"
    mesh: str = ""
    offload: dict[str, str] = field(default_factory=dict)  # of Offload
    is_offloaded: bool = False
    precision: str = ""  # a whole expression
    is_choice: bool = False  # which of several, is decided at run time
    scaler: dict[str, str] = field(default_factory=dict)  # of GradScaler
    setup: list[str] = field(default_factory=list)  # lines on the model, before shard
    optimizer: str = ""  # zerolite's class; "": the program builds its own
    hyper: dict[str, str] = field(default_factory=dict)
    max_grad_norm: str = ""
    schedule: str = ""  # a name of transformers.get_scheduler
    schedule_arguments: dict[str, str] = field(default_factory=dict)
    accumulation: str = "1"
    autocast: str = ""  # a dtype
    loader: dict[str, str] = field(default_factory=dict)  # of DataLoader
    num_ranks: str = ""
    num_machines: int = 1
    machine_rank: str = ""
    address: str = ""
    port: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    needs_args: bool = False  # some values are transformers' TrainingArguments
    notes: list[str] = field(default_factory=list)

    @property
    def shards_parameters(self) -> bool:
        return {"3": True}.get(self.stage, False)

    def shard_arguments(self) -> dict[str, str]:
        found = {"stage": self.stage}
        if self.mesh:
            found["mesh"] = self.mesh
        if self.is_offloaded:
            found["offload"] = _call("zerolite.Offload", self.offload) if self.offload else '"cpu"'
        if self.precision:
            found["precision"] = "precision" if self.is_choice else self.precision
        return found

    def lines(self) -> list[str]:
        """The loop's lines."""
        found = [
            "import torch",
            *(["import transformers"] if self.schedule else []),
            "import zerolite",
            "",
        ]
        if self.mesh:
            found.append(f"mesh = {self.mesh}")
        found += self.setup
        if self.scaler:
            found.append(f"scaler = {_call('torch.amp.GradScaler', self.scaler)}")
        if self.is_choice:
            parts = self.precision.split(" else ")
            found += ["precision = (", *(f"    {part} else" for part in parts[:-1]), f"    {parts[-1]}", ")"]
        arguments = self.shard_arguments() | ({"mesh": "mesh"} if self.mesh else {})
        found += _wrapped("zerolite.shard", "model", arguments)
        clip = {"max_grad_norm": self.max_grad_norm} if self.max_grad_norm else {}
        if self.optimizer:
            found += _wrapped(f"optimizer = zerolite.{self.optimizer}", "model.parameters()", self.hyper | clip)
        else:
            found += _wrapped("optimizer = zerolite.like", "torch_optimizer", clip)
            found[-1] += "  # of the AdamW or Adam that your program builds"
        if self.schedule:
            first = f'"{self.schedule}", optimizer'
            found += _wrapped("scheduler = transformers.get_scheduler", first, self.schedule_arguments)
        if self.loader:
            found.append(f"loader = {_call('torch.utils.data.DataLoader', {'dataset': 'dataset', **self.loader})}")
        return [*found, *self._loop()]

    def _loop(self) -> list[str]:
        forward = "model(**batch).loss"
        step = ["optimizer.step()", *(["scheduler.step()"] if self.schedule else []), "optimizer.zero_grad()"]
        head = f'with torch.autocast("cuda", {self.autocast}):' if self.autocast else ""
        if self.accumulation == "1":
            compute = [f"loss = {forward}"]
            body = [head, *(f"    {line}" for line in compute)] if head else compute
            return ["for batch in loader:", *(f"    {line}" for line in [*body, "loss.backward()", *step])]
        compute = [f"loss = {forward} / {self.accumulation}  # DeepSpeed and Accelerate divide by themselves"]
        body = [head, *(f"    {line}" for line in compute)] if head else compute
        return [
            "for i, batch in enumerate(loader):",
            f"    is_last = (i + 1) % {self.accumulation} == 0",
            "    with zerolite.no_sync(model, enabled=not is_last):",
            *(f"        {line}" for line in [*body, "loss.backward()"]),
            "    if is_last:",
            *(f"        {line}" for line in step),
        ]

    def integration(self) -> str:
        """`zero=` of the integrations with other trainers."""
        return _call("dict", self.shard_arguments())

    def integration_lines(self) -> list[str]:
        return _wrapped("zero=dict", "", self.shard_arguments())

    def command(self) -> str:
        """How to start it."""
        settings = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        count = self.num_ranks or "GPUS"
        if self.num_machines == 1:
            return f"{settings}torchrun --standalone --nproc-per-node {count} train.py"
        rank = shlex.quote(self.machine_rank or "MACHINE")
        where = f"--master-addr {shlex.quote(self.address or 'HOST')} --master-port {shlex.quote(self.port or '29500')}"
        start = f"{settings}torchrun --nnodes {self.num_machines} --node-rank {rank} {where}"
        return f"{start} --nproc-per-node {count} train.py"


def source(value) -> str:
    """A value of a configuration as Python source; lists are tuples."""
    if isinstance(value, list | tuple):
        return f"({', '.join(source(item) for item in value)}{',' if len(value) == 1 else ''})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _call(name: str, arguments: dict[str, str]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"


def _wrapped(name: str, first: str, arguments: dict[str, str]) -> list[str]:
    """A call on one line, or on several where it is long."""
    parts = [*filter(None, [first]), *(f"{key}={value}" for key, value in arguments.items())]
    line = f"{name}({', '.join(parts)})"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name}(", *(f"    {part}," for part in parts), ")"]


def note(text: str) -> str:
    return textwrap.fill(text, 108, initial_indent="- ", subsequent_indent="  ")
