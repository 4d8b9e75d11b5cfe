"""In fp64, do diffusers' models train at every stage as on one process with plain torch?"""

from __future__ import annotations

import pytest
import torch
from models import assert_close, assert_same_bits

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from diffusers_runs import FAMILIES, Result, Run, exported, in_fp32, joint_batch, output_of, reference, train  # noqa: E402


def assert_equal(results: list[Result], expected: Result) -> None:
    """Losses (the sum of all ranks is the joint batch's) and norms to 1e-12, parameters as everywhere."""
    losses = [sum(losses) for losses in zip(*(result.losses for result in results), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=1e-12)
    for result in results:
        assert result.norms == pytest.approx(expected.norms, rel=1e-12)
        assert_close(result.parameters, expected.parameters, atol=1e-12)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_training_equals_plain_torch(ranks, tmp_path, family, lora, checkpointing, offload, world, stage):
    run = Run(family, offload=offload, checkpointing=checkpointing, lora=lora)
    assert_equal(ranks(world).run(train, run, stage, str(tmp_path)), reference(run, world))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_checkpoint_goes_on_at_another_stage(ranks, tmp_path, family, offload, then, stage):
    run = Run(family, then=then, offload=offload)
    assert_equal(ranks(2).run(train, run, stage, str(tmp_path / "saved")), reference(run, 2))


@pytest.mark.each  # every kind of folder: tests/checkpoint/test_diffusers_folders.py
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_an_export_paints_the_same_in_diffusers_and_loads_with_the_same_bits(
    ranks, tmp_path, family, offload, then, stage
):
    run = Run(family, offload=offload)
    results = ranks(2).run(exported, run, stage, then, str(tmp_path / "model"))
    for _, trained, loaded in results:
        assert_same_bits(loaded, trained)
    output, trained, _ = results[0]
    opened = type(FAMILIES[family]()).from_pretrained(tmp_path / "model")
    assert_same_bits(dict(opened.named_parameters()), trained)
    with torch.no_grad():
        assert torch.equal(output_of(opened, in_fp32(joint_batch(family, 1))), output)
