"""save and load take (model, folder); the old order works and says so; anything else says what was expected."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from saved import attempt, make, rank, tree

import zerolite


def save_and_load(folder: Path, as_text: bool, is_old: bool) -> list:
    """The extra that came back, and (text, file) of every FutureWarning, from two loops of two steps."""
    model, optimizer = make(3)
    target = str(folder) if as_text else folder
    first, second = (target, model) if is_old else (model, target)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # as Python starts: a warning is shown once a line
        for step in range(2):
            zerolite.save(first, second, optimizer, {"step": step}, frozen=False)
        for _ in range(2):
            extra = zerolite.load(first, second, optimizer)
    return [extra, [(str(w.message), w.filename) for w in seen if w.category is FutureWarning]]


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_model_then_folder_is_silent(ranks, tmp_path, as_text):
    """The order of export and adapters.save."""
    for extra, seen in ranks(2).run(save_and_load, tmp_path / "step", as_text, False):
        assert extra == {"step": 1} and not seen


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_the_old_order_works_and_says_so(ranks, tmp_path, as_text):
    """Folder then model does the same; one FutureWarning a call site, at the caller's line, names the new order."""
    for extra, seen in ranks(2).run(save_and_load, tmp_path / "step", as_text, True):
        assert extra == {"step": 1}
        assert len(seen) == 2 and all(file == __file__ for _, file in seen), seen
        for name, (text, _) in zip(("save", "load"), seen, strict=True):
            assert f"call zerolite.{name}(model, folder)" in text


def wrong_orders(folder: Path) -> list[tuple[str, str]]:
    model, optimizer = make(1)
    calls = []
    for first, second in ((model, model), (folder, folder), (model, None), (model, optimizer), (7, model)):
        calls.append(attempt(lambda first=first, second=second: zerolite.save(first, second)))
        calls.append(attempt(lambda first=first, second=second: zerolite.load(first, second)))
    return calls


def test_neither_order_is_a_type_error(ranks, tmp_path):
    """The message says what was expected and which types came; nothing is written."""
    came = ["(Odd, Odd)", "Path)", "(Odd, NoneType)", "(Odd, AdamW)", "(int, Odd)"]
    for results in ranks(2).run(wrong_orders, tmp_path / "step"):
        for index, (kind, text) in enumerate(results):
            name = ("save", "load")[index % 2]
            assert kind == "TypeError" and f"zerolite.{name} takes (model, folder)" in text, (kind, text)
            assert "a torch.nn.Module and a path, got" in text and came[index // 2] in text, text
    assert not tree(tmp_path)


def save_by_name(folder: Path):
    model, optimizer = make(2)
    zerolite.save(folder=folder, model=model, optimizer=optimizer, extra=rank())
    return zerolite.load(folder=folder, model=model, optimizer=optimizer)


def test_names_need_no_order(ranks, tmp_path):
    """Calls by keyword are what they were."""
    assert ranks(2).run(save_by_name, tmp_path / "step") == [0, 1]
