"""Does the example that paints train as plain torch does, go on from checkpoints, and paint what a prompt asks for?"""

from __future__ import annotations

import re
from unittest import mock

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'zerolite[test]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zerolite[train]'")

import torch  # noqa: E402
from diffusers import PixArtTransformer2DModel  # noqa: E402
from example_runs import Result, run  # noqa: E402
from PIL import Image  # noqa: E402
from trainer_tasks import largest_difference  # noqa: E402

from zerolite.adapters import load  # noqa: E402
from zerolite.examples import diffusion, shapes  # noqa: E402

SMALL = {"WIDTH": 16, "ROWS": 4, "AVERAGED": 2, "SAVED": 2, "PAINTED": 2}
RIGHT = r"^(.+): colour right in (\d+) of \d+, shape in (\d+) of"
PAIRS = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]


def small(is_original: bool, folder: str, **options) -> Result:
    return run("diffusion", is_original, constants=SMALL, folder=folder, steps=4, **options)


def both_on_rank(folder: str) -> tuple[Result, list[Result]]:
    plain = small(True, folder)
    runs = [small(False, f"{folder}/1", stage=1), small(False, f"{folder}/2", stage=2, offload="cpu")]
    runs += [small(False, f"{folder}/3", stage=3), small(False, f"{folder}/4", stage=3, offload="cpu")]
    return plain, [*runs, small(False, f"{folder}/5", stage=3, offload="cpu", resume=f"{folder}/1/step-2")]


def test_it_trains_as_its_original_and_goes_on_at_another_stage(ranks, tmp_path):
    """Two ranks of DistributedDataParallel in fp64; losses, and the average that is left in the model."""
    (tmp_path / "original").mkdir()
    for expected, (*runs, resumed) in ranks(2).run(both_on_rank, str(tmp_path / "original")):
        assert len(expected.losses) == 4
        for result in runs:
            assert result.losses == pytest.approx(expected.losses, rel=1e-12)
            assert largest_difference(result.parameters, expected.parameters) < 1e-12
        assert resumed.losses == pytest.approx(expected.losses[2:], rel=1e-12)
        assert largest_difference(resumed.parameters, expected.parameters) < 1e-12


def program_on_rank(options: dict) -> None:
    with mock.patch.multiple(diffusion, **SMALL):
        diffusion.program(**options)


def test_it_leaves_pictures_a_model_and_an_adapter(ranks, tmp_path):
    """Which diffusers and `adapters.load` open; the prompts' pictures stand in one PNG."""
    options = {"stage": 3, "offload": "cpu", "steps": 5, "folder": str(tmp_path), "resume": ""}
    ranks(2).run(program_on_rank, options)
    with Image.open(tmp_path / "samples.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "model")
    plain = diffusion.paint(model, ["a red circle", "紫色的圆"])
    load(model, tmp_path / "adapter")
    adapted = diffusion.paint(model, ["a red circle", "紫色的圆"])
    assert plain.isfinite().all() and not torch.equal(plain, adapted)


def test_the_judge_sees_what_was_drawn():
    """Every colour and shape, with noise, in both languages; and not another one."""
    pairs = PAIRS * 4
    pictures = shapes.draw(pairs, torch.Generator().manual_seed(0))
    noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    assert shapes.judge(noisy) == pairs
    wrong = [PAIRS[(PAIRS.index(pair) + 5) % len(PAIRS)] for pair in pairs]
    assert shapes.share(noisy, wrong) == "colour right in 0 of 80, shape in 0 of 80"


def test_prompts_in_both_languages_are_words():
    words = [shapes.WORDS[index] for index in shapes.encode(["a red circle", "红色的正方形"]).argmax(-1).flatten()]
    assert words == ["a", "red", "circle", "红色", "的", "正方形"]
    assert not shapes.encode([""]).any()
    with pytest.raises(ValueError, match="a prompt is like .* got 'a red dog'"):
        shapes.encode(["a red dog"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_training_colour_and_shape_are_what_the_prompt_says(ranks, tmp_path):
    """The command of the page, at its defaults, on two ranks at stage 3 with offload."""
    ranks(2, timeout=1200).run(diffusion.program, 3, "cpu", diffusion.STEPS, str(tmp_path), "")
    said = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    rights = {title: (int(colour), int(shape)) for title, colour, shape in re.findall(RIGHT, said, re.MULTILINE)}
    assert rights["before"][0] <= 8 and rights["before"][1] <= 8
    for title in ("after", "after, in Chinese"):
        assert rights[title][0] >= 15 and rights[title][1] >= 13, said
    assert rights["after LoRA"][0] == 4, said
