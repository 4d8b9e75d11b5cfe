"""Which parameters live together: blocks found or named, tied and frozen parameters, where groups are cut."""

from __future__ import annotations

import re

import pytest
import torch
from models import Block, Stack, gpt2, llama, mixtral, t5
from torch import nn

from zerolite.shards.units import plan_units, repeated_blocks, unit_modules


def names_of(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


def planned(model: nn.Module, rule=None, dtype_of=lambda parameter: parameter.dtype) -> list[tuple]:
    """(unit, trainable, names of each such group) in order."""
    found: dict[tuple, list] = {}
    for plan in plan_units(model, rule, dtype_of):
        for group in plan.groups:
            found.setdefault((plan.name, group.is_trainable), []).append(group.names)
    return [(*unit, groups) for unit, groups in found.items()]


# found


@pytest.mark.parametrize(
    "factory, blocks",
    [
        (Stack, ["blocks.0", "blocks.1", "blocks.2"]),
        (llama, ["model.layers.0", "model.layers.1"]),
        (gpt2, ["transformer.h.0", "transformer.h.1"]),
        (mixtral, ["model.layers.0", "model.layers.1"]),
        (t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()), ["0", "2"]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU()), []),  # what repeats has no parameters
        (lambda: nn.Sequential(nn.ModuleList([Block(2)]), nn.ModuleList([Block(2)])), ["0", "1"]),
        (lambda: nn.Linear(2, 2), []),
        (lambda: nn.ModuleList([]), []),
    ],
)
def test_blocks_are_found(factory, blocks):
    """The outermost modules that a list repeats are units, not what they contain, whatever the family."""
    model = factory()
    assert names_of(model, repeated_blocks(model)) == blocks


def test_a_block_that_stands_twice_is_one():
    """A module that a list holds twice is one block."""
    block, other = Block(3), Block(3)
    model = nn.Sequential(block, other, block)
    assert names_of(model, repeated_blocks(model)) == ["0", "1"]


# named


def test_units_by_class_and_predicate():
    """units= takes a class, several, or a predicate; units may nest, and the model itself is none of them."""
    model = Stack(blocks=2)
    blocks = ["blocks.0", "blocks.1"]
    linears = [f"blocks.{n}.{name}" for n in range(2) for name in ("up", "down")]
    assert names_of(model, unit_modules(model, Block)) == blocks
    assert names_of(model, unit_modules(model, (Block, nn.LayerNorm))) == [
        "blocks.0",
        "blocks.0.norm",
        "blocks.1",
        "blocks.1.norm",
    ]
    assert names_of(model, unit_modules(model, nn.Linear)) == ["first", *linears, "last"]
    assert names_of(model, unit_modules(model, lambda m: isinstance(m, Stack | Block))) == blocks


@pytest.mark.parametrize("rule", ["Block", 3, (Block, "Block"), [Block, nn.Linear, 3]])
def test_a_rule_that_is_none_is_refused(rule):
    """What is neither classes nor a predicate is a TypeError that shows it."""
    with pytest.raises(TypeError, match=re.escape(repr(rule))):
        unit_modules(Stack(), rule)


@pytest.mark.parametrize("rule", [nn.Conv2d, lambda module: False, Stack])
def test_a_rule_that_matches_nothing_is_refused(rule):
    """A rule without a match is a ValueError, not a silent single unit."""
    with pytest.raises(ValueError, match="matches no module of Stack"):
        unit_modules(Stack(), rule)


# planned


def all_names(plans: list[tuple]) -> list[str]:
    return [name for _, _, groups in plans for group in groups for name in group]


@pytest.mark.parametrize("factory", [Stack, llama, lambda: llama(tied=True), gpt2, t5, mixtral])
@pytest.mark.parametrize("rule", [None, nn.Linear, lambda module: True])
def test_every_parameter_has_one_place(factory, rule):
    """Each parameter is in one group of one unit, a tied one once, and the root comes first."""
    model = factory()
    if rule is nn.Linear and not any(isinstance(module, nn.Linear) for module in model.modules()):
        rule = nn.Embedding
    plans = planned(model, rule)
    assert sorted(all_names(plans)) == sorted(name for name, _ in model.named_parameters())
    assert plans[0][0] == "(root)" or all(name != "(root)" for name, _, _ in plans)


def test_the_innermost_unit_owns():
    """A nested unit takes its own parameters out of the one around it."""
    plans = planned(Stack(blocks=1), (Block, nn.LayerNorm))
    assert sorted(plans) == [
        ("(root)", True, [["first.weight", "first.bias"], ["last.weight", "last.bias"]]),
        ("blocks.0", True, [["blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.weight", "blocks.0.down.bias"]]),
        ("blocks.0.norm", True, [["blocks.0.norm.weight", "blocks.0.norm.bias"]]),
    ]


def test_a_parameter_that_units_share_belongs_to_the_root():
    """A weight tied over two blocks is gathered for the whole step; one tied inside a block stays there."""
    model = Stack(blocks=3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    model.blocks[1].again = model.blocks[1].up
    plans = {(name, trainable): groups for name, trainable, groups in planned(model)}
    root = [name for group in plans["(root)", True] for name in group]
    assert "blocks.0.up.weight" in root and "blocks.1.up.weight" not in root
    assert "blocks.1.up.weight" in plans["blocks.1", True][0]
    assert "blocks.2.up.weight" not in all_names(planned(model))


def test_a_module_that_two_units_hold_belongs_to_the_root():
    """A module shared by two blocks is the root's, all of it."""
    model = Stack(blocks=2)
    model.blocks[1].norm = model.blocks[0].norm
    plans = {name: groups for name, _, groups in planned(model)}
    assert {"blocks.0.norm.weight", "blocks.0.norm.bias"} <= {name for group in plans["(root)"] for name in group}


def test_frozen_parameters_are_kept_apart():
    """A unit with both kinds has groups of each; one that is all frozen has frozen ones."""
    model = Stack(blocks=2)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].norm.requires_grad_(False)
    plans = planned(model)
    assert [(name, trainable) for name, trainable, _ in plans] == [
        ("(root)", True),
        ("blocks.0", False),
        ("blocks.1", False),
        ("blocks.1", True),
    ]
    assert plans[2][2] == [["blocks.1.norm.weight", "blocks.1.norm.bias"]]


def test_a_group_has_one_dtype():
    """Parameters of other dtypes are other groups, unless the precision gives all of them one."""
    model = Stack(blocks=1)
    model.blocks[0].norm.to(torch.float64)
    names = [f"blocks.0.{name}" for name in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight")]
    plans = planned(model, Block)
    assert plans[1][2] == [names[:2], [*names[2:], "blocks.0.down.bias"]]
    assert len(planned(model, Block, lambda parameter: torch.float32)[1][2]) == 1


def test_embeddings_and_the_output_layer_are_reduced_apart():
    """The root's parameters before and behind the blocks are two groups, for their gradients come first and last."""
    ((_, _, root), *_) = planned(llama())
    assert root == [["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]]
