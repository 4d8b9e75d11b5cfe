"""How far is the first choice of `zerolite.recommend` from the fastest configuration, measured?

Small LLaMAs, precisions, rows, stages and limits of a device are drawn. For each, `recommend` lists what fits, with
rates that these ranks have just measured; every listed one that fits is built and takes steps by turns, in an order
that rotates from round to round. A ratio is of two times of one round, the median over rounds counts: the machine is
shared. Beside seconds stand CPU seconds of a rank and its workers, which other jobs disturb less; on a CPU, where
nothing hides behind anything, they say the same.

    python benchmarks/scale/first_choice.py --rounds 3                       # eight minutes on two busy cores
    python benchmarks/scale/first_choice.py --number 2 --rounds 2
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of what all benchmarks share

import harness
import psutil
import torch
import torch.distributed as dist

VOCABULARY, LENGTH, STEPS = 2048, 64, 2  # steps of one turn
ENOUGH = 1.10


def draw(seed: int, number: int) -> list[dict]:
    """Configurations as plain values; `place` is where the device's limit lies between the least and the most."""
    choice = random.Random(seed)
    return [
        {
            "hidden": choice.choice([128, 192, 256]),
            "layers": choice.choice([2, 3, 4]),
            "dtype": choice.choice(["fp32", "bf16"]),
            "rows": choice.choice([1, 2, 4]),
            "stages": sorted(choice.sample(range(4), 2)),
            "place": choice.uniform(0.05, 1.0),
        }
        for _ in range(number)
    ]


def build(case: dict) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = case["hidden"]
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": case["layers"]}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=hidden // 32, vocab_size=VOCABULARY))


def recommended(case: dict, rates):
    import zerolite

    options = {"batch": case["rows"], "length": LENGTH, "device": "cpu", "ranks_per_host": dist.get_world_size()}
    options |= {"precision": zerolite.Precision(DTYPES[case["dtype"]]), "rates": rates}
    options |= {"stages": case["stages"], "checkpointing": (False, True)}
    roomy = zerolite.recommend(build(case), dist.get_world_size(), 1 << 50, **options)
    peaks = [candidate.plan.peak_bytes for candidate in roomy.candidates]
    limit = min(peaks) / 0.94 + case["place"] * (max(peaks) / 0.94 - min(peaks) / 0.94)
    return zerolite.recommend(build(case), dist.get_world_size(), int(limit), **options)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def steps_of(case: dict, candidate) -> Callable[[], None]:
    """A turn of one candidate: STEPS steps, and what its workers have to do for them. Collective."""
    import zerolite

    model = build(case).train()
    if candidate.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zerolite.shard(model, precision=zerolite.Precision(DTYPES[case["dtype"]]), **candidate.shard_arguments)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (case["rows"], LENGTH))

    def turn() -> None:
        for _ in range(STEPS):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.detach()  # workers are done

    return turn


def cpu_seconds() -> float:
    own = psutil.Process()
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in own.children())


def measure(cases: list[dict], rounds: int) -> list[dict]:
    """Of each case the candidates in the order of `recommend`, and seconds of each one's turns. Collective."""
    from zerolite.memory.measured_rates import slowest_rates

    rates = slowest_rates(0.5)
    rows = []
    for case in cases:
        found = [candidate for candidate in recommended(case, rates).candidates if candidate.fits]
        turns = [steps_of(case, candidate) for candidate in found]
        for turn in turns:
            turn()
        wall, cpu = ([[] for _ in found] for _ in range(2))
        for number in range(rounds):
            for place in range(len(found)):
                index = (place + number) % len(found)
                dist.barrier()
                start, used = time.perf_counter(), cpu_seconds()
                turns[index]()
                dist.barrier()
                wall[index].append(time.perf_counter() - start)
                cpu[index].append(cpu_seconds() - used)
        planned = [candidate.plan.time.total_seconds for candidate in found]
        rows.append({"names": [c.name for c in found], "planned": planned, "wall": wall, "cpu": cpu})
        del turns
    return [{"rates": rates.as_json()}, *rows]


def compare(times: list[list[float]]) -> tuple[int, float]:
    """(the fastest's index, the first's time over its, in a round), by medians over rounds."""
    fastest = min(range(len(times)), key=lambda index: statistics.median(times[index]))
    return fastest, statistics.median(mine / least for mine, least in zip(times[0], times[fastest], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=20, help="of configurations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    facts, cases = harness.machine_facts(("torch", "transformers")), draw(options.seed, options.number)
    arguments = {"cases": cases, "rounds": options.rounds}
    ranks = harness.launch(measure, arguments, 2, {"LOCAL_WORLD_SIZE": "2"}, timeout=7200)
    table, num_within = [], {"wall": 0, "cpu": 0}
    for case, *each in zip(cases, *(rank[1:] for rank in ranks), strict=True):
        joint = {
            "wall": each[0]["wall"],
            "cpu": [
                [sum(one) for one in zip(*turns, strict=True)]
                for turns in zip(*(row["cpu"] for row in each), strict=True)
            ],
        }
        cells = [f"{case['hidden']} x {case['layers']}, {case['dtype']}, {case['rows']} rows", str(len(joint["wall"]))]
        cells.append(each[0]["names"][0].removeprefix("full, "))
        for clock, times in joint.items():
            fastest, ratio = compare(times)
            num_within[clock] += ratio <= ENOUGH
            cells += [each[0]["names"][fastest].removeprefix("full, "), f"{ratio:.2f}"]
        table.append(cells)
    header = ["LLaMA", "fit", "first choice", "fastest by time", "ratio", "fastest by CPU time", "ratio"]
    said = ", ".join(f"{count} of {len(cases)} by {clock} time" for clock, count in num_within.items())
    text = "\n\n".join(
        [
            "# The first choice of `recommend` beside the fastest configuration measured",
            harness.facts_markdown(facts),
            f"2 ranks over gloo, {LENGTH} tokens a row, {options.rounds} rounds by turns. The first choice is within "
            f"{100 * (ENOUGH - 1):.0f} % of the fastest in {said}.",
            harness.markdown_table(header, table),
        ]
    )
    results = {"facts": facts, "rates": ranks[0][0]["rates"], "cases": cases, "ranks": [rank[1:] for rank in ranks]}
    harness.write_report(options.output, "first_choice_cpu", results, text)
    print(text)


if __name__ == "__main__":
    main()
