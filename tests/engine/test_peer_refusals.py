"""What the suites of FSDP2 and DeepSpeed ask and zerolite cannot do: is it refused by name before it is trained?"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from models import Stack, drawn, llama
from saved import attempt
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm

import zerolite

X = torch.ones(4, 5, dtype=torch.float64)


def sharded(stage: int, build: Callable[[], nn.Module] = Stack) -> nn.Module:
    """On one rank; at stage 3 parameters are streamed, so that they are freed between uses."""
    offload = zerolite.Offload(parameters=True, workers=1, threads=1) if stage == 3 else None
    return zerolite.shard(drawn(build).double(), stage=stage, offload=offload)


def whole(model: nn.Module, stage: int):
    return zerolite.full_params(model, writeback=True) if stage == 3 else contextlib.nullcontext()


def learn(model: nn.Module) -> None:
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    model(X).sum().backward()
    optimizer.step()


def surgery(operation: Callable[[nn.Module], object]) -> Callable[[int], None]:
    """Done where values are whole, after an optimizer was built."""

    def run(stage: int) -> None:
        model = sharded(stage)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
        with whole(model, stage):
            operation(model.blocks[0].up)
        model(X).sum().backward()
        optimizer.step()

    return run


def outside(operation: Callable[[nn.Module], object]) -> Callable[[int], None]:
    def run(stage: int) -> None:
        model = sharded(stage)
        operation(model.blocks[0].up)
        learn(model)

    return run


def removed_weight_norm(stage: int) -> None:
    def build():
        model = Stack()
        weight_norm(model.blocks[0].up)
        return model

    model = sharded(stage, build)
    with whole(model, stage):
        remove_weight_norm(model.blocks[0].up)
    model(X)


def resized(tied: bool, is_inside: bool) -> Callable[[int], None]:
    def run(stage: int) -> None:
        model = sharded(stage, lambda: llama(tied=tied, layers=1))
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
        with whole(model, stage) if is_inside else contextlib.nullcontext():
            model.resize_token_embeddings(70, mean_resizing=False)
        model(input_ids=torch.arange(3, 11)[None]).logits.sum().backward()
        optimizer.step()

    return run


def shared_memory(stage: int) -> None:
    model = sharded(stage)
    with whole(model, stage):
        model.share_memory()


def lazy(stage: int) -> None:
    zerolite.shard(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), stage=stage)


def optimizer_in_backward(stage: int) -> None:
    """An optimizer a parameter, stepped as soon as its gradient is there."""
    model = sharded(stage)
    optimizers = {parameter: zerolite.AdamW([parameter], lr=1e-2) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    model(X).sum().backward()


def step_in_a_hook_of_a_module(stage: int) -> None:
    model = sharded(stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    model.blocks[0].register_full_backward_hook(lambda *_: optimizer.step())
    model(X).sum().backward()


def in_a_hook_of_a_gradient(look: Callable[[torch.Tensor], object]) -> Callable[[int], None]:
    def run(stage: int) -> None:
        def hook(parameter: torch.Tensor) -> None:
            look(parameter.grad)

        model = sharded(stage)
        model.blocks[1].up.bias.register_post_accumulate_grad_hook(hook)
        model(X).sum().backward()

    return run


def tensor_left_by_a_hook(stage: int) -> None:
    model = sharded(stage)

    def hook(parameter: torch.Tensor) -> None:
        parameter.grad = torch.zeros_like(parameter)

    model.blocks[1].up.bias.register_post_accumulate_grad_hook(hook)
    learn(model)


def called_on_what_reads_as_nan(stage: int) -> None:
    model = sharded(stage)
    functional_call(model, {name: parameter * 2 for name, parameter in model.named_parameters()}, (X,))


def mapped(stage: int) -> None:
    model = sharded(stage)
    vmap(lambda row: model(row[None])[0])(X)


def transformed_while_workers_step(stage: int) -> None:
    model = zerolite.shard(drawn(Stack).double(), stage=stage, offload=zerolite.Offload(workers=1, threads=1))
    learn(model)
    jacrev(model)(X)


def sparse(stage: int) -> None:
    model = sharded(stage, lambda: nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2)))
    model(torch.tensor([1, 2, 1])).sum().backward()


NEW = "became a parameter of the model after zerolite.shard"
NAN = "blocks.0.up.weight was renamed or removed.* read as NaN: do it inside zerolite.full_params"
IN_A_HOOK = "an optimizer steps when loss.backward.. has returned"

REFUSED: dict[str, tuple[Callable[[int], None], tuple[int, ...], str]] = {
    "weight_norm": (surgery(weight_norm), (1, 3), f"blocks.0.up.weight_g, .*{NEW}"),
    "weight_norm, new": (surgery(parametrizations.weight_norm), (1, 3), f"blocks.0.up.parametrizations.*{NEW}"),
    "weight_norm, removed": (removed_weight_norm, (1, 3), f"blocks.0.up.weight, .*{NEW}"),
    "pruned": (outside(lambda module: prune.l1_unstructured(module, "weight", 0.5)), (3,), NAN),
    "spectral_norm": (outside(spectral_norm), (3,), NAN),
    "spectral_norm, new": (outside(parametrizations.spectral_norm), (3,), NAN),
    "resized": (resized(False, False), (1, 3), rf"lm_head.weight, of shape \(70, 16\), {NEW}"),
    "resized whole": (resized(False, True), (1, 3), rf"lm_head.weight, of shape \(70, 16\), {NEW}"),
    "resized, tied": (resized(True, False), (1, 3), r"embed_tokens.weight was .* replaced .*shape \(70, 16\)"),
    "resized whole, tied": (resized(True, True), (1, 3), r"embed_tokens.weight was .* replaced .*shape \(70, 16\)"),
    "share_memory": (shared_memory, (3,), "share_memory: .* lies in memory that is freed"),
    "lazy": (lazy, (1, 3), "1.weight has no shape before the first forward of its lazy module"),
    "optimizer in backward": (optimizer_in_backward, (0, 1, 3), IN_A_HOOK),
    "step in a hook": (step_in_a_hook_of_a_module, (1, 3), IN_A_HOOK),
    "norm in a hook": (in_a_hook_of_a_gradient(lambda gradient: gradient.norm()), (1, 3), "norms .* after backward"),
    "scaled in a hook": (in_a_hook_of_a_gradient(lambda gradient: gradient.mul_(2)), (1, 3), "blocks.1.up.bias.*hook"),
    "read in a hook": (in_a_hook_of_a_gradient(lambda gradient: gradient.clone()), (1, 3), "blocks.1.up.bias.*clone"),
    "tensor left by a hook": (tensor_left_by_a_hook, (1, 3), "blocks.1.up.bias.grad was set to a tensor"),
    "functional_call": (called_on_what_reads_as_nan, (3,), "first.weight was replaced by values computed.*NaN"),
    "vmap": (mapped, (3,), "root.*torch.func.*stage=2"),
    "jacrev": (transformed_while_workers_step, (1,), "root.*torch.func.*workers have stepped.*model.parameters"),
    "sparse": (sparse, (0, 3), "0.weight has a sparse gradient"),
}


def tried(stage: int) -> dict[str, tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: attempt(lambda run=run: run(stage)) for name, (run, stages, _) in REFUSED.items() if stage in stages
        }


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_it_is_refused_by_name(ranks, stage):
    (said,) = ranks(1).run(tried, stage)
    for name, (kind, text) in said.items():
        assert kind in ("ValueError", "ZeroliteError"), f"{name}: {kind} {text}"
        assert re.search(REFUSED[name][2], text), f"{name}: {text}"
