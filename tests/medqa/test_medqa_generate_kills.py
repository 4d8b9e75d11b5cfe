"""Does `zerolite generate`, killed again and again, lose, pay twice or let slip anything of a bad server?"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import json_repair  # noqa: F401  # the program's fork has it then
import openai  # noqa: F401
import pytest
import tenacity  # noqa: F401
from limits import until
from odd_endpoint import EVALUATION, FAMILY, KEY, Endpoint, text_of
from programs import Program

from zerolite.medqa import data
from zerolite.medqa.generate.command import main  # noqa: F401
from zerolite.medqa.similar import NearDuplicates, Overlap

CONCURRENCY = 8


def files(folder: Path) -> list[str]:
    """Passages of both languages and an evaluation set."""
    draw = random.Random(3)
    passages = [
        {"text": "\n".join(text_of(language, draw) for _ in range(6)), "source": "book", "licence": "MIT"}
        for language in ("en", "zh")
        for _ in range(10)
    ]
    evaluation = [{"instruction": question, "output": "I do not know it."} for question in EVALUATION.values()]
    for name, rows in (("passages", passages), ("evaluation", evaluation)):
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "generate.py").write_text("import sys\nfrom zerolite import cli\nsys.exit(cli.main())\n")
    return ["--passage_file", str(folder / "passages.jsonl"), "--evaluation_file", str(folder / "evaluation.jsonl")]


class Runs:
    """Starts of the program in one folder, and what they printed."""

    def __init__(self, folder: Path, server: Endpoint, *options: str):
        self.folder, self.server, self.output = folder, server, folder / "generated"
        self.log = folder / "log"
        self.arguments = [
            "generate", "--output_dir", str(self.output), "--model", "odd", *files(folder), *options,
            "--timeout", "3", "--retry_wait", "0.02", "--max_new_tokens", "400",
        ]  # fmt: skip

    def start(self, *options: str) -> Program:
        with self.log.open("a") as log:
            environment = {**self.server.environment, "OPENAI_LOG": "debug"}
            return Program(self.folder / "generate.py", [*self.arguments, *options], None, environment, log)

    def end(self, program: Program, seconds: float) -> int | None:
        """Its exit status, once it has ended."""
        until(lambda: program.poll() is not None, seconds)
        return program.returncode

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.output / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def campaign(folder: Path, num_requests: int, num_kills: int, seed: int) -> str:
    """Kill a run so many times, let it end, and ask the server what it was paid for; the figures."""
    began, draw = time.monotonic(), random.Random(seed)
    with Endpoint(seed) as server:
        runs = Runs(folder, server, "--num_requests", str(num_requests), "--concurrency", str(CONCURRENCY))
        moments = sorted(draw.sample(range(1, num_requests), num_kills))
        for moment in moments:
            program = runs.start()
            until(lambda at=moment: sum(server.paid.values()) >= at, 300.0)
            time.sleep(draw.uniform(0, 0.02))
            assert program.poll() is None, runs.log.read_text()[-3000:]
            program.kill()
            runs.end(program, 20.0)
        assert runs.end(runs.start(), 900.0) == 0, runs.log.read_text()[-3000:]
        asked = sum(server.paid.values())
        journal = (runs.output / "journal.jsonl").read_bytes()
        assert runs.end(runs.start(), 60.0) == 0  # which asks nothing
        assert sum(server.paid.values()) == asked and (runs.output / "journal.jsonl").read_bytes() == journal
    charged = charged_by(runs.output / "journal.jsonl")
    assert server.billed.total <= charged, "the ledger counted less than was paid, so a ceiling would not hold"
    twice = sum(server.paid.values()) - len(server.paid)
    assert twice <= CONCURRENCY * num_kills and server.most_in_flight <= CONCURRENCY * (num_kills + 1)
    assert sum("-check" not in name for name in server.paid) == num_requests
    rows = runs.rows()
    questions = Counter(row["messages"][0]["content"] for row in rows)
    lost, kept = server.good - set(questions), set(questions) - server.good
    assert not lost, f"{len(lost)} rows were lost: {sorted(lost)[:3]}"
    near = {language: NearDuplicates() for language in FAMILY}
    for language, index in near.items():
        index.add(language, (" " if language == "en" else "").join(FAMILY[language]))
    of_family = Counter(language for text in kept for language, index in near.items() if index.find(text))
    assert max(questions.values()) == 1 and sum(of_family.values()) == len(kept) and of_family == {"en": 1, "zh": 1}
    evaluation = Overlap(EVALUATION.values())
    texts = [message["content"] for row in rows for message in row["messages"]]
    assert not [text for text in texts if evaluation.find(text)]
    assert not holding_the_key(folder)
    assert len(data.read([runs.output / "rows.jsonl"]).kept) == len(rows)
    assert not data.read([runs.output / "rows.jsonl"]).ignored
    card = (runs.output / "card.md").read_text(encoding="utf-8")
    for reason in ("a refusal", "cut off", "malformed", "not in the language", "near", "shares a passage", "evidence"):
        assert reason in card, reason
    faults = ", ".join(f"{count} {name}" for name, count in server.faults.most_common())
    return (
        f"{num_requests} requests and {len(server.paid) - num_requests} checks, {num_kills} kills, {faults}: "
        f"{twice} answers paid twice (at most {CONCURRENCY * num_kills}), {len(rows)} rows kept, 0 lost, "
        f"{charged} tokens charged for {server.billed.total}; "
        f"{time.monotonic() - began:.0f} s"
    )


def charged_by(journal: Path) -> int:
    """Tokens that the ledger counts, read by another rule: what was sent, less what is known not to have been used."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    total, last = 0, {}
    for entry in entries:
        total += sum(entry["tokens"])
        if entry["kind"] != "sent":
            total -= sum(last[entry["id"]])
        last[entry["id"]] = entry["tokens"]
    return total


def holding_the_key(folder: Path) -> list[str]:
    """Files in which eight characters of the key stand one after another."""
    runs = {KEY[start : start + 8].encode() for start in range(len(KEY) - 7)}
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [name for name, content in contents.items() if any(run in content for run in runs)]


def test_a_run_that_is_killed_loses_no_row_and_pays_for_what_was_in_flight(tmp_path):
    print(campaign(tmp_path, 150, 2, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_5000_requests_killed_ten_times(tmp_path):
    print(campaign(tmp_path, 5000, 10, seed=2))


def test_the_ceiling_holds_over_kills_and_time_outs(tmp_path):
    """By the server's own count, of time-outs and lost connections too; then a higher ceiling goes on."""
    with Endpoint(5, fault_rate=0.2) as server:
        runs = Runs(tmp_path, server, "--num_requests", "60", "--concurrency", "4")
        program = runs.start("--max_tokens_total", "40000")
        until(lambda: sum(server.paid.values()) >= 5, 60.0)
        program.kill()
        runs.end(program, 20.0)
        assert runs.end(runs.start("--max_tokens_total", "40000"), 120.0) == 1
        billed = server.billed.total
        assert 5000 < billed <= 40000
        assert "ceiling of 40000 tokens is reached" in (runs.output / "card.md").read_text(encoding="utf-8")
        num_paid, rows = sum(server.paid.values()), runs.rows()
        assert runs.end(runs.start("--max_tokens_total", "40000"), 60.0) == 1
        assert sum(server.paid.values()) == num_paid and runs.rows() == rows  # nothing more is asked
        prices = ["--price_in", "1", "--price_out", "3", "--max_cost", "100"]
        assert runs.end(runs.start(*prices), 120.0) == 0
        assert {row["id"] for row in rows} <= {row["id"] for row in runs.rows()}
    assert not holding_the_key(tmp_path)
