"""One process, no process group: the same run on the CPU and on a GPU, streams, events and fused kernels included."""

import gc
import weakref

import pytest
import torch
from models import llama
from zerolite_kernels import cpu

import zerolite

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def train(device: str, stage: int, precision: zerolite.Precision | None, num_steps: int = 5, offload=None):
    """A tiny LLaMA, with accumulation and clipping; parameters, norms and peak bytes."""
    torch.manual_seed(0)
    model = zerolite.shard(llama().to(device), stage=stage, precision=precision, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(num_steps):
        for turn in range(2):
            ids = torch.randint(0, model.config.vocab_size, (4, 9), generator=generator).to(device)
            with zerolite.no_sync(model, enabled=turn == 0):
                logits = model(input_ids=ids).logits.float()
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return [parameter.detach().cpu().clone() for parameter in model.parameters()], norms, model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_trains_as_torch_does(device, stage):
    """Without torch.distributed a run ends where torch.optim.AdamW and clip_grad_norm_ end."""
    ours, norms, _ = train(device, stage, None)
    torch.manual_seed(0)
    model = llama().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        for _ in range(2):
            ids = torch.randint(0, model.config.vocab_size, (4, 9), generator=generator).to(device)
            logits = model(input_ids=ids).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item() == pytest.approx(norm, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach().cpu(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_fp32(device, dtype):
    """16-bit parameters with an fp32 master follow the fp32 run, and the model ends up in their dtype."""
    precise, exact_norms, _ = train(device, 2, None)
    scaler = torch.amp.GradScaler(device, init_scale=256.0) if dtype == torch.float16 else None
    rough, norms, model = train(device, 2, zerolite.Precision(param=dtype, scaler=scaler))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert norms[0] == pytest.approx(exact_norms[0], rel=0.05)
    distance = sum((a - b.float()).square().sum() for a, b in zip(precise, rough, strict=True)).sqrt()
    assert distance < 0.1 * sum(a.square().sum() for a in precise).sqrt()


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_keeps_a_model_where_it_lies(device):
    """Parameters, buffers and optimizer states are on the model's device after sharding."""
    _, _, model = train(device, 3, None, num_steps=1)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {device}
    usage = zerolite.measure(model)
    assert usage.parameters_bytes >= 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_nobody_holds_is_freed(stage):
    """Hooks live in C++, where the garbage collector sees no cycle: they keep neither the engine nor its memory."""
    _, _, model = train("cpu", stage, None, num_steps=2)
    engine = weakref.ref(model._zerolite)
    del model
    gc.collect()
    assert engine() is None


OFFLOADS = {
    "optimizer": (2, "cpu"),
    "optimizer-stage-3": (3, zerolite.Offload(workers=2, threads=1)),
    "parameters": (3, zerolite.Offload(parameters=True)),
    "budget": (2, zerolite.Offload(budget=600_000)),
    "bf16-states": (2, zerolite.Offload(states="bf16")),
    "int8-states": (2, zerolite.Offload(states="int8")),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [None, zerolite.Precision(torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_trains_as_the_device_does(device, precision, name):
    """Copies, events and workers: the run ends where the one without offload ends, but for the rounding of states."""
    stage, offload = OFFLOADS[name]
    if offload != "cpu" and offload.states != "fp32" and cpu.path() is None:
        pytest.skip("the host kernels were not built")
    plain, norms, _ = train(device, stage, precision)
    ours, our_norms, model = train(device, stage, precision, offload=offload)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert our_norms == pytest.approx(norms, rel=0.05)
    distance = sum((a.float() - b.float()).square().sum() for a, b in zip(ours, plain, strict=True)).sqrt()
    exact = precision is None and "states" not in name
    assert distance < (1e-4 if exact else 0.05) * sum(a.float().square().sum() for a in plain).sqrt()


@pytest.mark.gpu
def test_streamed_parameters_take_two_units_of_device_memory():
    """Offload(parameters=True): the peak of a forward and backward is far below the model."""
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU()) for _ in range(24)]
    model = torch.nn.Sequential(*blocks).to(torch.bfloat16)
    whole = sum(parameter.numel() * 2 for parameter in model.parameters())
    with torch.device("cuda"):
        x = torch.randn(8, 2048, dtype=torch.bfloat16)
    model = zerolite.shard(model.cuda(), stage=3, offload=zerolite.Offload(parameters=True))
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-4)
    x @ x.T  # cuBLAS takes its workspace, 32 MiB on Hopper, at the first product
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    list(model.parameters())
    assert torch.cuda.max_memory_allocated() - before < whole / 2
