"""What do `save`, `export` and `adapters.save` make of a folder that others use: another program, a link, a file?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from medqa_runs import tiny_llama
from saved import attempt, make, rank

import zerolite
from zerolite import adapters
from zerolite.runtime import safetensors_file


def save_while(root: Path, meanwhile: Callable[[Path], None], who: int) -> tuple[str, str]:
    """Save; right before rank `who` writes its file, something happens."""
    model, optimizer = make(2)
    original = safetensors_file.write_safetensors

    def write(path, *given):
        if rank() == who:
            meanwhile(path.parent)
        original(path, *given)

    safetensors_file.write_safetensors = write
    try:
        return attempt(lambda: zerolite.save(model, root / "step", optimizer))
    except KeyboardInterrupt:
        return "KeyboardInterrupt", ""
    finally:
        safetensors_file.write_safetensors = original


def test_a_folder_that_another_program_removes_is_said_to_be_that(ranks, tmp_path):
    """As one does that saves to the same folder: it takes what it finds for left by a run that was killed."""
    for kind, text in ranks(2).run(save_while, tmp_path, shutil.rmtree, 1):
        assert kind == "CheckpointError" and "is gone, or not to be seen on this rank" in text
        assert "no other program saves to" in text and "rank 1: " in text
    assert os.listdir(tmp_path) == []


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_save_leaves_nothing(ranks, tmp_path):
    (kind, _), *_ = ranks(1).run(save_while, tmp_path, interrupt, 0)
    assert kind == "KeyboardInterrupt" and os.listdir(tmp_path) == []


def writers() -> dict[str, Callable[[Path], None]]:
    sharded, adapted = zerolite.shard(tiny_llama(), stage=2), tiny_llama()
    adapters.add_lora(adapted)
    return {
        "save": lambda folder: zerolite.save(sharded, folder),
        "export": lambda folder: zerolite.export(sharded, folder),
        "adapter": lambda folder: adapters.save(adapted, folder),
    }


@pytest.mark.parametrize("what", ["save", "export", "adapter"])
@pytest.mark.filterwarnings("ignore:adapter .default. adds nothing")
def test_links_stay_and_files_are_not_replaced(tmp_path, what):
    write, elsewhere, link = writers()[what], tmp_path / "elsewhere", tmp_path / "link"
    link.symlink_to(elsewhere / "folder")
    for _ in range(2):  # new, and over an older one
        write(link)
        assert link.is_symlink() and os.listdir(elsewhere) == ["folder"] and len(os.listdir(link)) >= 2
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name in "file", "pipe":
        with pytest.raises((ValueError, zerolite.ZeroliteError), match=name):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "file", "link", "pipe"]
