"""Does a model that sees learn what stands in pictures, and does its result say the same in transformers?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from limits import load
from medqa_runs import to_flags
from PIL import Image
from seeing_models import write_seer
from shapes import write_rows
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import train_medqa
from zerolite import cli
from zerolite.medqa import chat, data, desk, opening, web
from zerolite.medqa.answers import NOTICE
from zerolite.medqa.arguments import parse
from zerolite.medqa.generation import Settings, replies
from zerolite.medqa.images import files, rows, sight


def train(argv: list[str]) -> int:
    return train_medqa.train(train_medqa.prepare(parse(argv)))


def flags(model: Path, file: Path, output: Path, **options) -> list[str]:
    given = {
        "model_name_or_path": model,
        "train_file": file,
        "image_folder": file.parent,
        "output_dir": output,
        "cutoff_len": 64,
        "eval_steps": 0,
        "learning_rate": 3e-3,
        **options,
    }
    return to_flags(given)


def answers_of(folder: Path, file: Path) -> tuple[list[str], list[str]]:
    """(what the model of a result says about the rows of a file, what they say)."""
    opened = opening.open_model(folder)
    kept = data.read([file], usable=rows.usable(file.parent)).kept
    seen, plain = ([row for row in kept if bool(row.images) is has] for has in (True, False))
    said = [
        one.text
        for part in (seen, plain)
        for start in range(0, len(part), 16)
        for one in replies(opened, part[start : start + 16], Settings(max_new_tokens=8))
    ]
    return said, [row.turns[0][1] for row in [*seen, *plain]]


def answers_of_transformers(folder: Path, file: Path) -> list[str]:
    """As `answers_of`, of the rows with images, by transformers' classes alone."""
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor, token_id = AutoImageProcessor.from_pretrained(folder), model.config.image_token_id
    token, said = tokenizer.convert_ids_to_tokens(token_id), []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "images" not in row:
            continue
        pictures = [Image.open(file.parent / name) for name in row["images"]]
        text = {"type": "text", "text": row["instruction"].replace("<image>\n", "")}
        messages = [{"role": "user", "content": [*[{"type": "image"}] * len(pictures), text]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        values = processor(images=pictures, return_tensors="pt")
        grid = values.get("image_grid_thw")
        number = 16 if grid is None else int(grid.prod()) // processor.merge_size**2
        ids = tokenizer(prompt.replace(token, token * number), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        if grid is not None:
            values["mm_token_type_ids"] = (ids == token_id).int()
        output = model.generate(ids, **values, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        said.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return said


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Rows about twelve pictures, and four without one."""
    return write_rows(tmp_path_factory.mktemp("few"), 12, text_rows=4)


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        ("qwen2_vl", 3),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("llava", 3), ("llava", 2), ("glm4v", 3)]),
    ],
)
def test_a_few_pictures_are_learned_and_transformers_says_the_same(ranks, few, tmp_path, capsys, family, stage):
    """Mixed rows on two ranks, which have images at different times."""
    model = write_seer(tmp_path / "base", family, hidden=64)
    options = {"max_steps": 60, "stage": stage, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    assert ranks(2).run(train, flags(model, few, tmp_path / "out", **options)) == [0, 0]
    said, expected = answers_of(tmp_path / "out", few)
    assert sum(one == other for one, other in zip(said, expected, strict=True)) >= 0.95 * len(expected)
    assert said[:12] == answers_of_transformers(tmp_path / "out" / "model", few)
    row = next(one for one in map(json.loads, few.read_text(encoding="utf-8").splitlines()) if "images" in one)
    image = few.parent / row["images"][0]
    capsys.readouterr()
    question = row["instruction"].replace("<image>\n", "")
    assert cli.main(["ask", str(tmp_path / "out"), "--image", str(image), question, "--max_new_tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() in said and NOTICE in err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "glm4v"])
def test_a_tiny_model_learns_to_count_squares_in_pictures_that_it_has_not_seen(ranks, tmp_path, family, stage):
    """Of both colours, in both languages: 95 % of the answers about new pictures are right."""
    model = write_seer(tmp_path / "base", family, hidden=64)
    learned = write_rows(tmp_path / "rows", 800, seed=0, most=3, text_rows=80)
    unseen = write_rows(tmp_path / "rows", 60, seed=1, most=3)
    options = {"max_steps": 400, "stage": stage, "per_device_train_batch_size": 8}
    assert ranks(2).run(train, flags(model, learned, tmp_path / "out", **options)) == [0, 0]
    said, expected = answers_of(tmp_path / "out", unseen)
    assert sum(one == other for one, other in zip(said, expected, strict=True)) >= 0.95 * len(expected)
    assert said == answers_of_transformers(tmp_path / "out" / "model", unseen)


@pytest.mark.parametrize(
    ("target", "is_tower"),
    [(None, False), ("all-linear", False), ("fc1 q_proj", False), (r".*vision_tower.*q_proj", True)],
)
def test_lora_leaves_the_tower_alone_unless_asked(few, tmp_path, target, is_tower):
    model = write_seer(tmp_path / "base", "llava")
    argv = flags(model, few, tmp_path / "out", finetuning_type="lora", max_steps=1)
    argv += [] if target is None else ["--lora_target", *target.split(" ")]
    run = train_medqa.prepare(parse(argv))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained and any("vision_tower" in name for name in trained) is is_tower
    if target == "all-linear":
        assert any("multi_modal_projector" in name for name in trained) and not any("lm_head" in n for n in trained)


def test_texts_alone_train_the_language_model_alone(few, tmp_path):
    model, texts = write_seer(tmp_path / "base", "llava"), tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"question": "What is it?", "answer": "A cough."}) + "\n", encoding="utf-8")
    argv = to_flags({"model_name_or_path": model, "train_file": texts, "max_steps": 1, "cutoff_len": 64})
    run = train_medqa.prepare(parse([*argv, "--output_dir", str(tmp_path / "out")]))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in run.model.named_parameters() if "language_model" in name or "lm_head" in name
    }


def test_an_adapter_of_a_model_that_sees_is_asked_about_pictures(ranks, few, tmp_path):
    model = write_seer(tmp_path / "base", "llava")
    options = {"finetuning_type": "lora", "max_steps": 2, "export_merged": True, "stage": 3}
    assert ranks(2).run(train, flags(model, few, tmp_path / "out", **options)) == [0, 0]
    adapted, _ = answers_of(tmp_path / "out" / "adapter", few)
    merged, _ = answers_of(tmp_path / "out" / "model", few)
    assert adapted == merged


def test_a_resumed_run_goes_on_with_pictures(few, tmp_path):
    """A checkpoint is asked; other pictures are other data."""
    model = write_seer(tmp_path / "base", "qwen2_vl")
    options = {"save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 8}
    assert train(flags(model, few, tmp_path / "whole", **options)) == 0
    said, _ = answers_of(tmp_path / "whole" / "checkpoint-2", few)
    assert len(said) == 16
    goes_on = ["--resume", str(tmp_path / "whole" / "checkpoint-2"), "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="freeze_vision_tower was True there and is False here"):
        train([*goes_on, "--no-freeze_vision_tower"])
    for path in few.parent.glob("*.png"):
        picture = Image.open(path)
        Image.eval(picture, lambda value: 255 - value).save(tmp_path / path.name)
    with pytest.raises(ValueError, match="fingerprint of the tokenised training rows"):
        train([*goes_on, "--image_folder", str(tmp_path)])


def test_a_file_of_questions_about_pictures_is_answered(few, tmp_path, capsys):
    model = write_seer(tmp_path / "base", "glm4v")
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    names = sorted(path.name for path in few.parent.glob("*.png"))[:2]
    asked = [{"question": "How many red squares?", "image": name} for name in names] + [{"question": "And you?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    argv = ["ask", str(model), "--questions", str(questions), "--answers", str(answers), "--max_new_tokens", "4"]
    assert cli.main(argv) == 2
    assert "--image_folder FOLDER reads images" in capsys.readouterr().err
    argv += ["--image_folder", str(few.parent)]
    assert cli.main(argv) == 0 and "3 answers written" in capsys.readouterr().err
    written = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [len(row.get("images", [])) for row in written] == [1, 1, 0] and all(row["notice"] for row in written)
    assert cli.main(argv) == 0 and "0 answers written" in capsys.readouterr().err
    questions.write_text(json.dumps({"question": "What?", "image": "../x.png"}) + "\n", encoding="utf-8")
    assert cli.main(argv) == 2
    assert re.search(r"questions\.jsonl, line 1: image \.\./x\.png: leaves the folder", capsys.readouterr().err)


def evaluated(argv: list[str]) -> int:
    from zerolite.medqa import evaluate

    prepared = evaluate.prepare(argv)
    evaluate.evaluate(prepared, evaluate.processes.join(), argv)
    return 0


def test_an_evaluation_over_rows_with_and_without_pictures_depends_on_no_rank(ranks, few, tmp_path):
    model = write_seer(tmp_path / "base", "llava")
    found = []
    for world, stage in ((1, 0), (2, 3)):
        output = tmp_path / f"out{world}"
        argv = to_flags(
            {
                "validation_file": few, "image_folder": few.parent, "output_dir": output, "stage": stage,
                "max_new_tokens": 3, "batch_size": 4,
            }
        )  # fmt: skip
        assert set(ranks(world).run(evaluated, [str(model), *argv])) == {0}
        record = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
        found.append(record)
    losses = [[of["loss"] for of in one["losses"]] for one in found]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)
    said = [[(row["question"], row.get("images"), row["model"]) for row in one["answers"]] for one in found]
    assert said[0] == said[1] and sum(bool(images) for _, images, _ in said[0]) == 12


def test_a_model_that_sees_still_answers_texts(tmp_path):
    model = write_seer(tmp_path / "base", "qwen2_vl")
    opened = opening.open_model(model)
    assert opened.tokenizer in sight.SIGHTS
    (found,) = replies(opened, [data.Conversation((("Hello?", ""),))], Settings(max_new_tokens=3))
    assert found.text


def test_a_dialogue_on_the_terminal_keeps_its_pictures(few, tmp_path, capsys):
    opened = opening.open_model(write_seer(tmp_path / "base", "llava"))
    dialogue = chat.Dialogue(opened, Settings(max_new_tokens=2))
    image = next(few.parent.glob("*.png"))
    with pytest.raises(ValueError, match="is no image"):
        dialogue.show(few)
    dialogue.show(image)
    dialogue.ask("How many red squares?")
    dialogue.ask("And blue ones?")
    assert [one.path for one in dialogue.images] == [image] and len(dialogue.turns) == 2
    dialogue.reset()
    assert not dialogue.images


def test_the_page_takes_pictures_and_shows_what_is_wrong_with_one(few, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'zerolite[web]'")
    from gradio_client import Client, handle_file

    model = write_seer(tmp_path / "base", "qwen2_vl")
    made = desk.Desk(opening.open_variants(model, []), Settings(max_new_tokens=3))
    blocks = web.page(web.load(), made, "seer")
    _, url, _ = web.launch(blocks, "127.0.0.1", None)
    client = Client(url, verbose=False, analytics_enabled=False)
    try:
        image, question = next(few.parent.glob("*.png")), "How many red squares?"
        damaged = tmp_path / "damaged.png"
        damaged.write_bytes(image.read_bytes()[:60])

        def ask(*pictures: Path) -> tuple[list[dict], str]:
            asked = {"text": question, "files": [handle_file(str(path)) for path in pictures]}
            job = client.submit(asked, "", "", "en", api_name="/answer")
            job.result(timeout=120 * load())
            shown = [one for one in job.outputs() if isinstance(one[0], list)]
            return shown[-1][0], shown[-1][1]

        conversation = rows.with_images(data.Conversation(((question, ""),)), [files.read(image)])
        (expected,) = replies(opening.open_model(model), [conversation], Settings(max_new_tokens=3))
        messages, _ = ask(image)
        assert messages[-1]["content"][0]["text"] == web.plain(expected.text)
        assert [one["role"] for one in messages] == ["user", "user", "assistant"]  # the picture, the question
        _, status = ask(damaged)
        assert "is damaged" in status
    finally:
        client.close()
        made.close()
        blocks.close(verbose=False)
