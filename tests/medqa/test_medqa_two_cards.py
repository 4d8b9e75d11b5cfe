"""Does every command of the page for two cards run as written, from raw files to answers, on a tiny model?"""

from __future__ import annotations

import glob
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from medqa_runs import needs_shared, write_talker
from paths import ROOT, SHARED
from programs import Program

from zerolite import cli
from zerolite.medqa import web
from zerolite.medqa.answers import NOTICE

PAGE = ROOT / "zerolite" / "medqa" / "TWO_CARDS.md"
RAW = [
    "raw_samples/huatuo/llama_data.sample20.json",
    "raw_samples/pubmedqa/ori_pqal.sample20.json",
    "raw_samples/toyhom/sample20.gb18030.csv",
]
FOLDERS = ("raw", "models", "data", "outputs", "questions.txt", "answers.jsonl")  # where the page has its files
# What makes the page's settings small: behind the command's own options, so the last one counts.
SMALL = {
    "torchrun": ["--cutoff_len", "96", "--max_samples", "6", "--max_steps", "2", "--learning_rate", "1e-2"],
    "evaluate": ["--max_samples", "4", "--max_answers", "1", "--max_new_tokens", "8", "--cutoff_len", "128"],
    "ask": ["--max_new_tokens", "8"],
    "chat": ["--max_new_tokens", "8"],
    "prepare": [],
    "generate": ["--num_requests", "6", "--concurrency", "2"],
}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page's blocks, with those that go on over several lines as one."""
    lines = [line[4:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def name_of(command: list[str]) -> str:
    return command[1] if command[0] == "zerolite" else command[0]


def small(command: list[str], folder: Path) -> list[str]:
    """The command in `folder`, on small settings."""
    found: list[str] = []
    for word in command:
        word = str(folder / word) if word.split("/")[0] in FOLDERS else word
        found += sorted(glob.glob(word)) if "*" in word else [word]
    generated = folder / "outputs" / "generated" / "rows.jsonl"
    if command[0] == "torchrun" and generated.is_file():
        found += ["--train_file", str(folder / "data" / "rows.jsonl"), str(generated)]
    return [*found, *SMALL[name_of(command)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's reader stands: raw files, models, a file of questions."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("raw", "data", "outputs"):
        (folder / name).mkdir()
    for name in RAW:
        shutil.copy(SHARED / "medqa" / name, folder / "raw")
    for name in ("Llama-3.1-8B-Instruct", "Llama-3.2-3B-Instruct"):
        write_talker(folder / "models" / name)
    (folder / "questions.txt").write_text("Is a fever dangerous?\n感冒了应该怎么办？\n", encoding="utf-8")
    return folder


def carried_out(command: list[str], monkeypatch) -> tuple[int, str]:
    """(exit status, what went to stderr where it is a program of its own)"""
    if command[0] == "torchrun":
        assert command[1:4] == ["--standalone", "--nproc-per-node", "2"] and command[4] == "train_medqa.py"
        program = Program(ROOT / "train_medqa.py", command[5:], 2, ENVIRONMENT)
        _, err = program.communicate()
        return program.returncode, err
    monkeypatch.setattr(web, "wait", lambda: None)  # for Ctrl-C
    return cli.main(command[1:]), ""


def told_of(name: str) -> str:
    return f"zerolite has no command {name} yet, which the page uses"


@pytest.fixture
def endpoint(monkeypatch):
    """A local server that answers as an OpenAI-compatible one."""
    if "generate" not in cli.COMMANDS:
        yield
        return
    with importlib.import_module("odd_endpoint").Endpoint(7, fault_rate=0, seconds=0) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield


@needs_shared
def test_the_page_leads_from_raw_files_to_answers(folder, endpoint, monkeypatch, capsys):
    """In the order of the page; what a step leaves is there, and the next step reads it."""
    commands, left_out = commands_of(PAGE), []
    assert [name_of(one) for one in commands].count("torchrun") == 2 and len(commands) >= 7
    if "prepare" not in cli.COMMANDS:
        pytest.skip(told_of("prepare"))
    for command in commands:
        name = name_of(command)
        if command[0] == "zerolite" and name not in cli.COMMANDS:
            left_out.append(name)
            continue
        if "--web" in command:
            pytest.importorskip("gradio", reason="the page's last command needs gradio")
        capsys.readouterr()
        status, err = carried_out(small(command, folder), monkeypatch)
        out, err_here = capsys.readouterr()
        assert status == 0, (command, err or err_here)
        if name in ("ask", "chat"):
            assert NOTICE in err_here
        if name == "ask" and "--questions" not in command:
            assert out.strip()
    for written in ("data/rows.jsonl", "data/rows.validation.jsonl", "data/rows.md", "outputs/lora/report.md"):
        assert (folder / written).is_file(), written
    assert (folder / "outputs/lora/adapter").is_dir() and (folder / "outputs/full/model").is_dir()
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["question"] for row in rows] == ["Is a fever dangerous?", "感冒了应该怎么办？"]
    if left_out:
        pytest.skip(f"all others ran; {', '.join(map(told_of, left_out))}")


@pytest.mark.parametrize("page", [PAGE, PAGE.with_suffix(".zh.md")], ids=lambda path: path.name)
def test_the_memory_of_the_page_is_what_its_products_give(page):
    products = re.findall(r"(\(?\d[\d.+/() ]* x [\d.]+) = ([\d.]+) GB", page.read_text(encoding="utf-8"))
    assert len(products) >= 9
    for product, said in products:
        assert eval(product.replace("x", "*")) == pytest.approx(float(said), abs=0.05), product
