"""Do the examples train as the scripts that they were made from do, with no more changes than their page counts?"""

from __future__ import annotations

import re

import pytest
import torch
from example_runs import FOLDER, NEW, WAS, Result, original, run, source_of
from programs import Program
from trainer_tasks import largest_difference

LOOPS = ["from_ddp", "from_deepspeed", "from_fsdp2", "nanogpt_shape", "plain_loop"]
NAMES = [*LOOPS, "accelerate_no_trainer", "lightning_module"]
WITHOUT_ORIGINAL = {"from_deepspeed"}  # DeepSpeed is no dependency, and has no CPU build here
ALL = [*NAMES, "diffusion"]  # which test_diffusion_example.py runs


def both_on_rank(name: str, stages: list[int], folder: str, options: dict) -> tuple[Result, list[Result]]:
    where = {"from_ddp": "folder", "from_fsdp2": "folder", "nanogpt_shape": "out_dir", "lightning_module": "folder"}
    where |= {"accelerate_no_trainer": "output_dir"}

    def at(kind: str) -> dict:
        return {where[name]: f"{folder}/{kind}", **options} if name in where else options

    expected = run(name, True, **at("original"))
    return expected, [run(name, False, stage=stage, **at(f"stage-{stage}")) for stage in stages]


def check(ranks, name: str, world: int, stages: list[int], folder, **options) -> None:
    exact = "dtype" not in options
    for expected, runs in ranks(world).run(both_on_rank, name, stages, str(folder), options):
        for result in runs:
            assert result.losses == pytest.approx(expected.losses, abs=1e-12 if exact else 1e-4, rel=0)
            assert largest_difference(result.parameters, expected.parameters) < (1e-12 if exact else 1e-4)


@pytest.mark.parametrize(
    ("name", "world", "stage"),
    [
        ("plain_loop", 1, 3),
        ("from_ddp", 2, 2),
        ("from_fsdp2", 2, 3),
        ("nanogpt_shape", 2, 3),
        ("lightning_module", 2, 3),
    ],
)
def test_an_example_trains_as_its_original(ranks, tmp_path, name, world, stage):
    check(ranks, name, world, [stage], tmp_path)


def test_the_no_trainer_script_trains_as_its_original(ranks, tmp_path):
    """With offload, in fp32."""
    check(ranks, "accelerate_no_trainer", 2, [3], tmp_path, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", sorted({*NAMES} - WITHOUT_ORIGINAL - {"plain_loop", "accelerate_no_trainer"}))
def test_examples_train_as_their_originals_at_all_stages(ranks, tmp_path, name, world):
    check(ranks, name, world, [0, 1, 2, 3], tmp_path)


def resumed_on_rank(folder: str) -> list[Result]:
    """nanogpt_shape to its end, and from the checkpoint in the middle at another stage."""
    whole = run("nanogpt_shape", False, stage=1, out_dir=folder)
    return [whole, run("nanogpt_shape", False, stage=3, out_dir=f"{folder}-2", init_from=folder)]


def test_nanogpt_goes_on_from_its_checkpoint_at_another_stage(ranks, tmp_path):
    for whole, rest in ranks(2).run(resumed_on_rank, str(tmp_path / "out")):
        assert rest.losses == pytest.approx(whole.losses[3:], abs=1e-12)
        assert largest_difference(rest.parameters, whole.parameters) < 1e-12


def resumed_no_trainer_on_rank(folder: str) -> list[Result]:
    whole = run("accelerate_no_trainer", False, torch.float32, stage=1, output_dir=folder)
    again = {"output_dir": f"{folder}-2", "resume_from": f"{folder}/step_2"}
    return [whole, run("accelerate_no_trainer", False, torch.float32, stage=3, **again)]


def test_the_no_trainer_script_goes_on_in_the_middle_of_an_epoch_at_another_stage(ranks, tmp_path):
    """With offload, in fp32, bit by bit."""
    for whole, rest in ranks(2).run(resumed_no_trainer_on_rank, str(tmp_path / "out")):
        assert rest.losses == whole.losses[4:] and len(rest.losses) == 10
        assert largest_difference(rest.parameters, whole.parameters) == 0.0


def deepspeed_on_rank(folder: str) -> list[list[float]]:
    return [run(name, False, torch.float32, folder=folder, steps=2).losses for name in ("from_deepspeed", "from_ddp")]


def test_the_deepspeed_example_trains_as_the_one_from_ddp(ranks, tmp_path):
    """Up to the schedule, which it has not; the script that it was made from is Python."""
    for one, other in ranks(2).run(deepspeed_on_rank, str(tmp_path / "out")):
        assert one == other
    assert compile(original(source_of("from_deepspeed")), "from_deepspeed.py", "exec")


def test_an_example_is_a_program():
    """Started by torchrun, without a process group."""
    program = Program(FOLDER / "plain_loop.py", [], 2, {})
    out, err = program.communicate()
    assert program.returncode == 0, err
    assert len(re.findall(r"losses \[\d+\.\d+", out)) == 2


def test_the_page_counts_what_changes():
    """A row an example: lines that are new, lines that were there."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {name: (int(new), int(was)) for name, new, was in re.findall(r"\| `(\w+)` \|.*\| (\d+) \| (\d+) \|", page)}
    counted = {}
    for name in ALL:
        lines = source_of(name).splitlines()
        counted[name] = (sum(line.endswith(NEW) for line in lines), sum(bool(WAS.match(line)) for line in lines))
    assert {name: rows[name] for name in counted} == counted


def test_examples_use_public_names_only():
    for name in [*ALL, "tiny", "shapes"]:
        modules = re.findall(r"^\s*(?:import|from) (zerolite[\w.]*)", source_of(name), re.MULTILINE)
        assert not [m for m in modules if not re.fullmatch(r"zerolite(\.(examples(\.tiny)?|integrations\.\w+))?", m)]
