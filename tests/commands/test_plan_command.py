"""`zerolite plan`: a table, a recommendation, JSON and a picture, from a name or a folder; exit status and mistakes."""

from __future__ import annotations

import json

import pytest
from live_bytes import gpt2, llama

from zerolite import cli
from zerolite.memory.presets import PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama().config.save_pretrained(path)
    return str(path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_table_of_every_configuration_and_the_fastest(capsys, folder):
    """A row for each method, stage and offload; the line to write; its bytes by kind; what was assumed."""
    status, out, err = run(capsys, folder, "--ranks", "2", "--length", "64")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.startswith(("full ", "lora "))]
    assert [row[:3] for row in rows[:9]] == [
        ["full", str(stage), offload]
        for offload, stages in (("none", range(4)), ("optimizer", range(4)), ("parameters", [3]))
        for stage in stages
    ]
    assert len(rows) == 18 and out.count("fastest that fits") == 1
    assert "zerolite.shard(model, stage=" in out and "activations" in out and "assumed:" in out


def test_json_has_every_number(capsys, folder, tmp_path):
    """What `recommend` found, as plain JSON, and a picture beside it."""
    picture = tmp_path / "plan.png"
    argv = [folder, "--ranks", "2", "--length", "64", "--method", "full", "--json", "--plot", str(picture)]
    status, out, err = run(capsys, *argv, "--stage", "2", "3", "--offload", "none", "--checkpointing", "on")
    found = json.loads(out)
    assert status == 0 and found["best"] == found["candidates"][0]["name"] == "full, stage 2, checkpointing"
    plan = found["candidates"][0]["plan"]
    assert plan["peak_bytes"] == max(p["total"] for p in plan["peaks"].values()) + plan["overhead_bytes"]
    assert plan["traffic"]["sent_bytes"] > 0 and plan["time"]["total_seconds"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in err


def test_nothing_fits_is_status_1(capsys, folder):
    status, out, _ = run(
        capsys, folder, "--device-memory", "800MiB", "--stage", "3", "--length", "64", "--method", "full"
    )
    assert status == 1 and "nothing fits" in out and "does not fit" in out


@pytest.mark.parametrize(
    "argv, text",
    [
        (["llama-8b"], "is no preset"),
        (["smollm2-135m", "--length", "100000"], "reads at most"),
        (["smollm2-135m", "--ranks", "0"], "number of at least 1"),
        (["smollm2-135m", "--device-memory", "many"], "many"),
        (["smollm2-135m", "--stage", "4"], "invalid choice"),
        ([], "required: MODEL"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, text):
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("zerolite plan: error: ") and text in err


def test_help_teaches(capsys):
    """Presets, examples and exit statuses."""
    with pytest.raises(SystemExit) as ended:
        run(capsys, "--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in text for name in PRESETS) and "exit status" in text and "examples:" in text


def test_a_folder_of_another_family(capsys, tmp_path):
    """GPT-2's config alone, without weights."""
    gpt2().config.save_pretrained(tmp_path)
    argv = ["--length", "32", "--stage", "2", "--offload", "none", "--method", "full"]
    assert run(capsys, str(tmp_path), *argv)[0] == 0
