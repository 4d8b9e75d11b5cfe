"""Is an evaluation on two ranks, whole or sharded at stage 3, the one of a single process?"""

from __future__ import annotations

import json
import math

import pytest
import torch
from medqa_runs import to_flags, write_talker
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import train_medqa
from zerolite import cli
from zerolite.medqa import evaluate
from zerolite.medqa.arguments import parse
from zerolite.medqa.evaluation import sharing
from zerolite.medqa.processes import Processes

ROWS = [{"instruction": f"Cough {'and fever ' * n}?", "output": f"Rest {n} days. " * (n + 1)} for n in range(5)]
ROWS += [{"instruction": f"咳嗽{n}天怎么办？", "output": "多喝水。" * (n + 1)} for n in range(4)]
CHOICES = [{"question": f"哪个{n}？", "options": {"A": "水", "B": "茶和盐"}, "answer": "AB"[n % 2]} for n in range(3)]


def status_on_rank(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    return evaluate.main(arguments)


@pytest.mark.parametrize("kind", ["base", "adapter", "checkpoint"])
def test_two_ranks_at_stage_3_give_the_report_of_one_process(kind, tmp_path, ranks):
    """To the bit: rows are batched before they are divided. Nine rows in batches of two: a rank has one less."""
    folder = write_talker(tmp_path / "base")
    if kind == "adapter":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
    if kind == "checkpoint":
        options = {"model_name_or_path": folder, "output_dir": tmp_path / "run", "max_steps": 1, "no-export": True}
        options |= {"max_samples": 2, "cutoff_len": 64, "learning_rate": 0.1}
        assert train_medqa.train(train_medqa.prepare(parse(to_flags(options)))) == 0
        folder = tmp_path / "run" / "checkpoint-1"
    arguments = [str(folder), "--batch_size", "2", "--max_new_tokens", "6", "--max_answers", "3"]
    for name, rows in (("validation_file", ROWS), ("choices", CHOICES)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        arguments += [f"--{name}", str(file)]
    found = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(["evaluate", *arguments, "--output_dir", str(tmp_path / "one")]) == 0
    torch.set_num_threads(num_threads)
    for stage in (0, 3) if kind == "base" else (3,):
        output = str(tmp_path / f"stage{stage}")
        assert ranks(2).run(status_on_rank, [*arguments, "--stage", str(stage), "--output_dir", output]) == [0, 0]
    for name in [path.name for path in tmp_path.iterdir() if (path / "evaluation.json").exists()]:
        found[name] = json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8"))
        run = found[name].pop("run")
        assert (run["ranks"], run["stage"]) == (1 if name == "one" else 2, 3 if name == "stage3" else 0)
        assert run["command"].startswith("zerolite evaluate" if name == "one" else "torchrun ")
    assert len(found) == (3 if kind == "base" else 2)
    assert all(one == found["one"] for one in found.values())


def rank_of() -> tuple[int, int]:
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def order_on_rank(num: int) -> tuple[list[int], int]:
    calls = []

    def work(batch: list[int]) -> list[int]:
        calls.append(batch)
        return [10 * item for item in batch]

    process = Processes(*rank_of(), torch.device("cpu"))
    return sharing.on_ranks(range(num), [-n for n in range(num)], 2, work, process, "test"), len(calls)


def test_results_lie_in_the_order_of_the_items_and_ranks_call_as_often(ranks):
    for num in (1, 2, 5, 7):
        (first, calls), (second, other) = ranks(2).run(order_on_rank, num)
        assert first == second == [10 * item for item in range(num)]
        assert calls == other == math.ceil(math.ceil(num / 2) / 2)


def test_nan_and_chinese_travel_between_ranks(ranks):
    assert ranks(2).run(travelled_on_rank) == [[["咳嗽", 0.1], {"a": None}]] * 2


def travelled_on_rank() -> list:
    process = Processes(*rank_of(), torch.device("cpu"))
    return sharing.gathered(["咳嗽", 0.1] if process.rank == 0 else {"a": None}, process)
