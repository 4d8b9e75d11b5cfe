"""Does transformers' LLaMA, split by torch's plan, train, read, edit and export as the whole one?"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from parallel_runs import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import zerolite

VOCAB, CLIP = 64, 0.01
COLUMNS, ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), (
    "self_attn.o_proj", "mlp.down_proj",
)  # fmt: skip


def make() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **sizes)).double()


def train(model: nn.Module, optimizer, rows: slice) -> list[float]:
    norms = []
    for step in range(2):
        tokens = torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(step))[rows]
        model(input_ids=tokens).logits.square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def split_run(folder: Path) -> dict:
    """Two by two ranks: norms; parameters as state dicts have them at stage 3 and, halved in place, at stage 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {**{name: ColwiseParallel() for name in COLUMNS}, **{name: RowwiseParallel() for name in ROWS}}
    models = [make(), make()]
    for model in models:
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tp"], plan)
    sharded, kept = (zerolite.shard(one, stage, mesh=mesh["dp"]) for one, stage in zip(models, (3, 2), strict=True))
    first = 2 * mesh["dp"].get_local_rank()
    norms = train(sharded, zerolite.AdamW(sharded.parameters(), lr=1e-2), slice(first, first + 2))
    zerolite.export(sharded, folder)
    with zerolite.full_params(sharded):
        state = sharded.state_dict()
        is_split = isinstance(state["model.layers.0.mlp.up_proj.weight"], DTensor)
        kept.load_state_dict(state)
        found = {name: whole(values) for name, values in state.items()}
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.mul_(0.25)
    for parameter in kept.parameters():
        parameter.data.mul_(2.0)
    zerolite.export(kept, folder / ".." / "halved")
    return {"norms": norms, "state": found, "is_split": is_split}


def test_a_split_llama_is_the_whole_one(ranks, tmp_path):
    """torch's clip, state dicts of DTensors, edits in place and through `.data`, and a folder for from_pretrained."""
    model = make()
    twin = copy.deepcopy(model)
    norms = train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2), slice(None))
    for result in ranks(4).run(split_run, tmp_path / "whole"):
        assert result["is_split"]
        assert max(abs(own / plain - 1) for own, plain in zip(result["norms"], norms, strict=True)) < 1e-6
        for name, values in twin.state_dict().items():
            assert (result["state"][name] - values).abs().max() < 1e-7  # its norms round to fp32
    for folder, scale in (("whole", 1.0), ("halved", 0.5)):
        read = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float64)
        for name, values in read.state_dict().items():
            assert torch.equal(values, scale * result["state"][name]), name
