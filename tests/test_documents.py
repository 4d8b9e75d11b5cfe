"""The pages say what is there: links and files exist, Python blocks parse, figures stand in results, states are all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

import zerolite
from zerolite.shards.states import LEGAL

PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted(ROOT.glob("zerolite/**/README.md")),
    *sorted(ROOT.glob("zerolite/**/TWO_CARDS*.md")),
    *sorted(ROOT.glob("benchmarks/**/README.md")),
]


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_files_exist(page):
    """Relative links, and files that are named with their folder from the root or from zerolite/."""
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    folders = "benchmarks/results|tests|zerolite|runtime|shards|offload|engine|optim"
    for name in re.findall(rf"`((?:{folders})/[\w/.*-]+)`", text):
        assert any(ROOT.glob(name)) or any((ROOT / "zerolite").glob(name)), f"{page_name(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_parse(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page_name(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_results_that_are_named_exist(page):
    """A figure of a page stands in a file of benchmarks/results."""
    names = re.findall(
        r"`((?:zero_step|host_time|offload|cpu_optimizer|lora|finetune|memory)[\w*]*\.md)`", page.read_text("utf-8")
    )
    assert not [name for name in names if not any((ROOT / "benchmarks").glob(f"**/{name}"))]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_is_short_and_names_every_public_name(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    results = {"Usage"}  # what measure returns; its fields are in its docstring
    assert not [name for name in zerolite.__all__ if name not in results and not re.search(rf"\b{name}\b", text)]


TRANSLATED = ["README.md", "zerolite/medqa/TWO_CARDS.md"]


def code_of(text: str) -> list[str]:
    """Blocks of code, with their commands and comments."""
    return re.findall(r"```python\n(?:[^`]+)```|(?:^ {4}[^\n]+\n)+", text, re.MULTILINE)


def figures_of(text: str) -> list[str]:
    """Numbers of a page outside of its code, sorted: a translation may tell them in another order."""
    for block in code_of(text):
        text = text.replace(block, "")
    return sorted(re.findall(r"\d+(?:[.,:]\d+)*", text))


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translation_has_the_code_the_figures_and_the_headings_of_its_page(name):
    """The Chinese page says what the English one says, and each leads to the other in its first lines."""
    english, chinese = ROOT / name, ROOT / name.replace(".md", ".zh.md")
    texts = [path.read_text(encoding="utf-8") for path in (english, chinese)]
    assert code_of(texts[0]) == code_of(texts[1]) and code_of(texts[0])
    assert figures_of(texts[0]) == figures_of(texts[1])
    for mark in (r"^(#+) ", r"^\|", r"^- "):
        assert len(re.findall(mark, texts[0], re.MULTILINE)) == len(re.findall(mark, texts[1], re.MULTILINE)), mark
    named = [re.findall(r"`(--?[\w-]+|[a-z_]+\(|\w+\.(?:md|py|jsonl|png))", text) for text in texts]
    assert sorted(named[0]) == sorted(named[1])
    assert f"]({chinese.name})" in texts[0][:200] and f"]({english.name})" in texts[1][:200]


def test_the_table_of_states_is_the_table_of_the_code():
    """zerolite/README.md lists every legal transition and no other."""
    text = (ROOT / "zerolite" / "README.md").read_text(encoding="utf-8")
    found = set()
    for chain in re.findall(r"[A-Z]+(?: -> [A-Z]+)+", text):
        states = chain.split(" -> ")
        found |= set(zip(states, states[1:], strict=False))
    assert found == {(before.name, after.name) for before, after in LEGAL}
