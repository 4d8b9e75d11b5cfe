"""Training on a mesh of pipeline stages, data and tensor parallelism, and the same by plain torch on one process.

Models are fp64 throughout and have no operation that rounds to less, as transformers' norms do: what differs between a
mesh and one process is the order of sums.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_optimizers import Lamb
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, debug
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

VOCAB, WIDTH, HEAD, LENGTH, ROWS, LAYERS, MICRO_BATCHES = 32, 16, 4, 8, 8, 4, 2
STEPS, CLIP, OPTIONS = 4, 0.05, {"lr": 1e-2, "weight_decay": 0.1}
SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for one in (self.q, self.k, self.v))
        angles = torch.outer(torch.arange(x.shape[1]), 100.0 ** -torch.linspace(0, 1, HEAD // 2)).to(x.dtype)
        q, k = _turned(q, angles), _turned(k, angles).repeat_interleave(2, dim=1)
        found = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, dim=1), is_causal=True)
        return self.o(found.transpose(1, 2).flatten(2))


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(WIDTH), Attention()
        self.ffn_norm, self.ffn = nn.RMSNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """Layers by their numbers in the whole model, and both ends where the stage has them."""

    def __init__(self, layers: range = range(LAYERS)) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH) if layers.start == 0 else None
        self.layers = nn.ModuleDict({str(number): LlamaLayer() for number in layers})
        is_last = layers.stop == LAYERS
        self.norm = nn.RMSNorm(WIDTH) if is_last else None
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.norm(x)) if self.head is not None and self.norm is not None else x


class Mlp(nn.Module):
    """Biases, LayerNorm, a buffer, a frozen weight, and a width (7) that two ranks cannot share evenly."""

    def __init__(self, layers: range = range(LAYERS)) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): MlpLayer(number) for number in layers})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class MlpLayer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.register_buffer("shift", torch.full((WIDTH,), float(number)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(self.frozen(x) + self.shift))))


MODELS = {"llama": Llama, "mlp": Mlp}


@cache
def whole_model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # else norms are ones, which hide an exchange of them
            parameter.data += torch.linspace(-0.1, 0.1, parameter.numel(), dtype=torch.float64)
    return model


def batch_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(100 + step)
    if name == "llama":
        tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=drawn)
        return tokens[:, :-1], tokens[:, 1:]
    x, y = torch.randn(2, ROWS, WIDTH, generator=drawn, dtype=torch.float64)
    return x, y


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    if target.dtype == torch.int64:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())
    return (output - target).square().mean()


@cache
def plain_run(name: str, rule: str = "AdamW") -> tuple[list[float], dict[str, Tensor]]:
    """Norms before clipping, and parameters after STEPS steps, of one process that knows nothing of zerolite."""
    model = copy.deepcopy(whole_model(name))
    optimizer = (torch.optim.AdamW if rule == "AdamW" else Lamb)(model.parameters(), **OPTIONS)
    norms = []
    for step in range(STEPS):
        x, y = batch_of(name, step)
        loss_of(model(x), y).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {key: parameter.detach() for key, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Case:
    """One run on a mesh."""

    model: str
    mesh: tuple[int, int, int]  # pipeline, data, tensor
    stage: int
    schedule: str = ""  # of SCHEDULES, where there are pipeline stages
    sequence: bool = False  # sequence parallelism
    no_sync: bool = False  # one reduction a step instead of one a micro-batch
    steps: tuple[int, int] = (0, STEPS)
    load: str = ""  # a folder to begin from
    save: str = ""  # a folder to end in
    offload: str | None = None
    rule: str = "AdamW"


def parts_of(case: Case, mesh: DeviceMesh) -> list[nn.Module]:
    """This rank's stages of the pipeline, each parallelized over the tensor dimension."""
    num_stages = case.mesh[0] * (2 if case.schedule == "interleaved" else 1)
    numbers = range(mesh["pp"].get_local_rank(), num_stages, case.mesh[0])
    parts = []
    for number in numbers:
        part = MODELS[case.model](range(number * LAYERS // num_stages, (number + 1) * LAYERS // num_stages)).double()
        part.load_state_dict({k: v for k, v in whole_model(case.model).state_dict().items() if k in part.state_dict()})
        if case.mesh[2] > 1:
            parallelize(part, mesh["tp"], case.sequence)
        parts.append(part)
    return parts


def parallelize(model: nn.Module, mesh: DeviceMesh, is_sequence: bool) -> None:
    if isinstance(model, Mlp):
        for layer in model.layers.values():
            up = ColwiseParallel(use_local_output=False)
            parallelize_module(layer, mesh, {"up": up, "down": RowwiseParallel()})
        return
    rows = Shard(1) if is_sequence else Replicate()
    gathered = PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(Replicate(),))
    norm = SequenceParallel()
    ends: dict = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        "head": ColwiseParallel(input_layouts=rows, output_layouts=Replicate()),
        "norm": norm,
    }
    layer: dict = {
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.o": RowwiseParallel(output_layouts=rows),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=rows),
    }
    if is_sequence:
        layer |= {"attention_norm": norm, "attention": gathered, "ffn_norm": norm, "ffn": gathered}
    else:
        ends.pop("norm")
    parallelize_module(model, mesh, {name: one for name, one in ends.items() if getattr(model, name) is not None})
    for one in model.layers.values():
        parallelize_module(one, mesh, layer)


def run_case(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """On every rank of the case's mesh: norms, and whole parameters of this rank's pipeline stages at the end."""
    import zerolite

    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=("pp", "dp", "tp"))
    parts = parts_of(case, mesh)
    model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    options = {} if case.offload is None else {"offload": case.offload}
    units = LlamaLayer if case.model == "llama" else None
    model = zerolite.shard(model, case.stage, mesh=mesh["dp"], norm_over=(mesh["pp"],), units=units, **options)
    optimizer = getattr(zerolite, case.rule)(model.parameters(), **OPTIONS, max_grad_norm=CLIP)
    if case.load:
        assert zerolite.load(model, Path(case.load), optimizer) == {"step": case.steps[0]}
    norms = train(case, mesh, model, parts, optimizer)
    if case.save:
        zerolite.save(model, Path(case.save), optimizer, extra={"step": case.steps[1]})
    with zerolite.full_params(model):
        return norms, {k: whole(p) for part in parts for k, p in part.named_parameters()}


def train(case: Case, mesh: DeviceMesh, model: nn.Module, parts: list[nn.Module], optimizer) -> list[float]:
    import zerolite

    group, num_stages = mesh["pp"].get_group(), case.mesh[0] * len(parts)
    first, norms = mesh["pp"].get_local_rank(), []
    schedule = None
    if case.schedule:
        stages = [
            PipelineStage(part, first + index * case.mesh[0], num_stages, torch.device("cpu"), group=group)
            for index, part in enumerate(parts)
        ]
        given = stages if case.schedule == "interleaved" else stages[0]
        schedule = SCHEDULES[case.schedule](given, MICRO_BATCHES, loss_fn=loss_of)
    rows = ROWS // case.mesh[1]
    start = mesh["dp"].get_local_rank() * rows
    for step in range(*case.steps):
        x, y = (one[start : start + rows] for one in batch_of(case.model, step))
        with zerolite.no_sync(model) if case.no_sync else contextlib.nullcontext():
            if schedule is None:
                loss_of(model(x), y).backward()
            else:
                inputs = (x,) if first == 0 else ()
                targets = {"target": y} if first == case.mesh[0] - 1 else {}
                schedule.step(*inputs, **targets)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    return norms


def whole(parameter: Tensor) -> Tensor:
    """A DTensor's values from all ranks. Collective."""
    found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return found.detach().clone()


def run_cases(cases: list[Case]) -> list[tuple[list[float], dict[str, Tensor]]]:
    """One after the other, on the same ranks."""
    # DTensor keeps meshes, by their names of groups, of a world that these processes were in before.
    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()
    results = []
    for case in cases:
        results.append(run_case(case))
        dist.barrier()
    return results


def difference(case: Case, results: list[tuple[list[float], dict[str, Tensor]]]) -> tuple[float, float]:
    """The largest of all ranks' norms, relative, and of all parameters, from those of one plain process.

    results: of every rank. AssertionError where they have not all parameters between them.
    """
    expected_norms, expected = plain_run(case.model, case.rule)
    wanted = expected_norms[slice(*case.steps)]
    norm = max(abs(n / e - 1) for norms, _ in results for n, e in zip(norms, wanted, strict=True))
    assert {name for _, parameters in results for name in parameters} == set(expected)
    if case.steps[1] < STEPS:
        return norm, 0.0
    return norm, max((p - expected[k]).abs().max().item() for _, found in results for k, p in found.items())
