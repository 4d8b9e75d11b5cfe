"""Are rows with images read in every public layout, and is what is wrong with one named with file and line?"""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from medqa_runs import tiny_llama, to_flags
from PIL import Image
from seeing_models import IMAGE_TOKEN, tokenizer_of, write_processor, write_seer
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

import train_medqa
from zerolite import DataError, cli
from zerolite.medqa import corpus, data, readers
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.batches import collate, fingerprint
from zerolite.medqa.images import files, rows, sight
from zerolite.medqa.prompts import IGNORED, encode, prompt_of
from zerolite.medqa.rows import PLACE, Conversation
from zerolite.medqa.split import apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images a.png to d.png, each of another colour, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "scans").mkdir()
    for number, name in enumerate("abcd"):
        Image.new("RGB", (40, 24), (60 * number, 20, 90)).save(folder / f"{name}.png")
    Image.new("RGB", (24, 24)).save(folder / "scans" / "e.jpg")
    (folder / "text.png").write_text("no image", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    (folder / "scan.png").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    Image.new("I;16", (24, 24)).save(folder / "deep.png")
    Image.new("RGB", (3000, 2)).save(folder / "thin.png")
    (folder / "bomb.png").write_bytes(_head_of(60_000, 60_000))
    (folder / "large.png").write_bytes(_head_of(12_000, 9_000))
    (folder.parent / "outside.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return folder


def _head_of(width: int, height: int) -> bytes:
    """A PNG that says that it is so large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


NUM_TOKENS = 2  # of an image of 40 x 24 pixels, where it is a grid of patches

LAYOUTS = {
    "llava": {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A scan."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    "llama-factory": {
        "messages": [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": "A scan."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": ["a.png"],
    },
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A scan."}]},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    },
    "parts without names": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A scan."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    "alpaca": {
        "instruction": "Sure?",
        "output": "Yes.",
        "history": [["<image>\nWhat is it?", "A scan."]],
        "images": ["a.png"],
    },
}


def read(folder: Path, row: object, tmp_path: Path, **options) -> data.Rows:
    """As training reads a file with that row behind a good one."""
    file = tmp_path / "rows.jsonl"
    good = {"question": "What is it?", "answer": "A scan.", "image": "b.png"}
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, row)), encoding="utf-8")
    return data.read([file], rows_of=readers.reader(None), usable=rows.usable(folder), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_each_layout_says_the_same(folder, tmp_path, layout):
    found = read(folder, LAYOUTS[layout], tmp_path).kept[1]
    assert found.turns == ((f"{PLACE}What is it?", "A scan."), ("Sure?", "Yes."))
    assert [image.path.name for image in found.images] == ["a.png"]


def test_images_without_a_place_stand_before_the_first_question(folder, tmp_path):
    found = read(folder, {"question": "Same?", "answer": "No.", "images": ["a.png", "scans/e.jpg"]}, tmp_path)
    assert [row.turns[0][0] for row in found.kept] == [f"{PLACE}What is it?", f"{PLACE}{PLACE}Same?"]
    assert [image.path.name for image in found.kept[1].images] == ["a.png", "e.jpg"]


def test_images_of_turns_that_are_dropped_go_with_them(folder, tmp_path):
    """The answer to the second image has no loss and is the last one."""
    messages = [
        {"role": "user", "content": "<image>One?"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "<image>Two?"}, {"role": "assistant", "content": "2", "weight": 0},
    ]  # fmt: skip
    found = read(folder, {"messages": messages, "images": ["a.png", "b.png"]}, tmp_path).kept[1]
    assert [image.path.name for image in found.images] == ["a.png"] and len(found.turns) == 1
    both = Conversation((("<image>a", "b"), ("<image><image>c", "d")), images=tuple("xyz"))
    assert (both.part(1).images, both.part(0, 1).images) == (("y", "z"), ("x",))


WRONG = {
    "text.png": "is no image that can be read, expected one of PNG",
    "empty.png": "is empty",
    "scan.png": "is DICOM",
    "cut.png": "is damaged",
    "deep.png": "more than 8 bits a channel",
    "thin.png": "over 200 times",
    "bomb.png": "pixels",
    "large.png": "has 12000 x 9000 pixels, expected at most 89,478,485",
    "none.png": "is not there",
    "scans": "is a folder",
    "../outside.png": "leaves the folder",
    "scans/../../outside.png": "leaves the folder",
    "link.png": "leaves the folder",
    "/etc/passwd": "leaves the folder",
    "https://example.org/x.png": "nothing is downloaded",
    "data:image/png;base64,AAAA": "nothing is downloaded",
    "a\0.png": "expected a file name",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_image_is_named_with_file_and_line(folder, tmp_path, name):
    row = {"question": "What is it?", "answer": "A scan.", "images": [name]}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: image.*--skip_invalid") as failure:
        read(folder, row, tmp_path)
    assert WRONG[name] in str(failure.value)
    found = read(folder, row, tmp_path, skip_invalid=True)
    assert (len(found.kept), len(found.rejected), found.rejected[0].line) == (1, 1, 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "<image><image>Same?", "images": ["a.png"]}, "has 2 places for images (<image>), and 1 images"),
        ({"question": "<image>Same?", "images": ["a.png", "b.png"]}, "has 1 places for images (<image>), and 2 images"),
        ({"question": "<image>Same?"}, "has 1 places for images (<image>), and 0 images"),
        ({"question": "Same?", "image": "a.png", "images": ["a.png"]}, "has both `images` and `image`"),
        ({"question": "<image>\n", "images": ["a.png"]}, "is empty but for its images"),
        ({"question": "<image>Same?", "images": [{"bytes": "x", "path": None}]}, "expected a file name, got an object"),
        ({"question": "<image>Same?", "images": [7]}, "expected a file name, got 7"),
        ({"question": "What?", "answer": "It <image>", "images": ["a.png"]}, "stands in an answer or a system text"),
        ({"text": "A passage.", "images": ["a.png"]}, "an image stands in a question"),
        ({"question": "What?", "videos": ["a.mp4"]}, "`videos` is not used"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected parts of type text or image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_whose_images_do_not_fit_is_named_with_file_and_line(folder, tmp_path, row, reason):
    row = row if {"text", "messages"} & row.keys() else {"answer": "Yes.", **row}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as failure:
        data.read([_file(tmp_path, row)], rows_of=readers.reader(None), usable=rows.usable(folder))
    assert reason in str(failure.value)


def _file(tmp_path: Path, row: object) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    return file


def test_without_image_folder_a_row_with_images_is_refused_and_told_how(tmp_path):
    with pytest.raises(DataError, match="line 2: `images` is not used.*--image_folder FOLDER reads images"):
        data.read([_file(tmp_path, {"instruction": "What?", "output": "Yes.", "images": ["a.png"]})])


# What the model reads #


@pytest.fixture(scope="module", params=IMAGE_TOKEN)
def seeing(request, tmp_path_factory):
    """(family, tokenizer with its sight, folder without weights)."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tokenizer_of(request.param)
    write_seer(folder, request.param)
    sight.look(folder, tokenizer, AutoConfig.from_pretrained(folder))
    return request.param, tokenizer, folder


def row_of(folder: Path, question: str, *names: str, answer: str = "A scan.") -> Conversation:
    return rows.with_images(Conversation(((question, answer),)), [files.read(folder / name) for name in names])


def test_ids_are_those_of_the_template_with_parts_and_image_tokens_have_no_label(folder, seeing):
    family, tokenizer, model_folder = seeing
    row = row_of(folder, "<image>\nWhat is it?", "a.png")
    ((example,), _) = encode([row], tokenizer, 128)
    token = IMAGE_TOKEN[family]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": row.turns[0][1]}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    number = sight.sight_of(tokenizer).num_tokens(row.images[0])
    expected = tokenizer(text.replace(token, token * number), add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == expected and number == {"llava": 16}.get(family, NUM_TOKENS)
    is_image = example.input_ids == tokenizer.convert_tokens_to_ids(token)
    assert is_image.sum() == number and (example.labels[is_image] == IGNORED).all()
    learned = tokenizer.decode(example.labels[example.labels != IGNORED])
    assert "A scan." in learned and "What" not in learned
    asked = prompt_of(Conversation(((row.turns[0][0], ""),), images=row.images), tokenizer, 100)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked.ids == tokenizer(prompt.replace(token, token * number), add_special_tokens=False)["input_ids"]


def test_what_is_collated_is_what_transformers_processor_gives(folder, seeing):
    family, tokenizer, model_folder = seeing
    chosen = [
        row_of(folder, "<image>What is it?", "a.png"),
        Conversation((("No image?", "None."),)),
        row_of(folder, "<image><image>Same?", "b.png", "scans/e.jpg"),
    ]
    examples, _ = encode(chosen, tokenizer, 256)
    batch = collate(examples, 0)
    pictures = [Image.open(folder / name).convert("RGB") for name in ("a.png", "b.png", "scans/e.jpg")]
    if family == "llava":  # the whole processor of the others needs torchvision
        processor = AutoProcessor.from_pretrained(model_folder)
        text = [tokenizer.decode(one.input_ids) for one in examples]
        text = [one.replace("<image>" * 16, "<image>") for one in text]
        expected = processor(text=text, images=pictures, add_special_tokens=False, padding=True, padding_side="right")
        assert [row[: len(e.input_ids)] for row, e in zip(expected["input_ids"], examples, strict=True)] == [
            e.input_ids.tolist() for e in examples
        ]
    expected = AutoImageProcessor.from_pretrained(model_folder)(images=pictures, return_tensors="pt")
    for name, values in expected.items():
        assert batch[name].equal(values), name
    if family != "llava":
        assert batch["mm_token_type_ids"].equal(
            (batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[family])).int()
        )
    assert "pixel_values" not in collate(examples[1:2], 0)


def test_a_row_with_images_is_never_cut(folder, seeing, tmp_path):
    """It is refused with its line, or counted; a text row is shortened as ever."""
    family, tokenizer, _ = seeing
    row = {"question": "<image>" + "What is it? " * 40, "answer": "A scan.", "image": "a.png"}
    kept = rows.fitting(rows.usable(folder), tokenizer, 64)
    with pytest.raises(
        DataError, match=r"line 2: cutoff_len: 64 tokens .* are of 1 images; rows with images are not cut"
    ):
        data.read([_file(tmp_path, row)], rows_of=readers.reader(None), usable=kept)
    long = Conversation((("<image>Old?", "Yes."), ("<image>New?", "No.")), images=(files.read(folder / "a.png"),) * 2)
    whole = len(prompt_of(long, tokenizer, 200).ids)
    asked = prompt_of(long, tokenizer, whole - 1)
    assert (asked.num_turns_lost, len(asked.images)) == (1, 1)  # a dialogue loses its oldest turns with their images
    with pytest.raises(ValueError, match="rows with images are not cut"):
        prompt_of(long, tokenizer, 5)


def test_a_special_token_in_a_row_s_own_text_stays_text(folder, seeing):
    family, tokenizer, _ = seeing
    token = IMAGE_TOKEN[family]
    if token == PLACE:
        return  # a place, where the row has images
    ((example,), _) = encode([row_of(folder, f"<image>What is {token}?", "a.png")], tokenizer, 128)
    number = (example.input_ids == tokenizer.convert_tokens_to_ids(token)).sum()
    assert number == sight.sight_of(tokenizer).num_tokens(files.read(folder / "a.png"))


def test_other_pictures_are_other_data(folder, seeing):
    _, tokenizer, _ = seeing
    prints = set()
    for name in ("a.png", "b.png"):
        examples, _ = encode([row_of(folder, "<image>What is it?", name)], tokenizer, 128)
        prints.add(fingerprint(examples))
    assert len(prints) == 2


def test_a_split_keeps_rows_of_one_image_together_and_others_apart(folder):
    chosen = [row_of(folder, "<image>What is it?", f"{name}.png") for name in "abcd" for _ in range(2)]
    train, validation, _ = apart(chosen, 2, seed=0)
    assert len(train) == 6 and len({row.images[0].digest for row in validation}) == 1


# Folders #


def flags(model: Path, rows_file: Path, images: Path, tmp_path: Path, **options) -> list[str]:
    return to_flags(
        {
            "model_name_or_path": model, "train_file": rows_file, "image_folder": images, "cutoff_len": 64,
            "output_dir": tmp_path / "out", "max_steps": 1, **options,
        }
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_processor_of_another_model_is_refused_before_training(folder, tmp_path, family):
    model = write_seer(tmp_path / "model", family)
    for name in sight.FILES:
        (model / name).unlink(missing_ok=True)
    file = _file(tmp_path, {"question": "What is it?", "answer": "A scan.", "image": "a.png"})
    with pytest.raises(ValueError, match="holds no image processor"):
        train_medqa.prepare(parse(flags(model, file, folder, tmp_path)))
    write_processor(model, {"llava": "glm4v", "qwen2_vl": "llava"}[family])
    with pytest.raises(ValueError, match="the image processor is of another model: merge_size"):
        train_medqa.prepare(parse(flags(model, file, folder, tmp_path)))
    write_processor(model, family)
    config = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    config |= {"crop_size": {"height": 36, "width": 36}} if family == "llava" else {"patch_size": 3}
    (model / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="the image processor is of another model"):
        train_medqa.prepare(parse(flags(model, file, folder, tmp_path)))


def test_the_model_is_asked_whether_it_reads_what_the_processor_gives(folder, tmp_path):
    """The number of tokens an image has is in no configuration of the model."""
    model = write_seer(tmp_path / "model", "llava")
    config = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))
    (model / "processor_config.json").write_text(json.dumps({**config, "patch_size": 12}), encoding="utf-8")
    file = _file(tmp_path, {"question": "What is it?", "answer": "A scan.", "image": "a.png"})
    with pytest.raises(ValueError, match="does not read what its image processor gives.*tokens: 4, features"):
        train_medqa.prepare(parse(flags(model, file, folder, tmp_path)))


def test_a_model_that_reads_texts_alone_is_refused(folder, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    AutoTokenizer.from_pretrained(CORPUS / "tokenizer").save_pretrained(model)
    file = _file(tmp_path, {"question": "What is it?", "answer": "A scan.", "image": "a.png"})
    with pytest.raises(ValueError, match="reads texts alone"):
        train_medqa.prepare(parse(flags(model, file, folder, tmp_path)))
    assert cli.main(["ask", str(model), "What is it?", "--image", str(folder / "a.png")]) == 2
    assert "reads texts alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing": True}, "--image_folder and --packing"),
        ({"finetuning_type": "prompt"}, "--image_folder and --finetuning_type prompt"),
        ({"model_name_or_path": None}, "expected a model that reads images"),
        ({"train_file": None}, "is of rows of yours"),
    ],
)
def test_options_that_do_not_go_with_images_are_refused(options, reason, tmp_path):
    given = {"model_name_or_path": "m", "train_file": "f", "image_folder": "i", **options}
    with pytest.raises(ValueError, match=reason):
        parse(to_flags({name: value for name, value in given.items() if value is not None}))


def test_a_folder_of_images_that_is_none_is_told(tmp_path):
    model = write_seer(tmp_path / "model", "llava")
    with pytest.raises(ValueError, match="--image_folder .*none: expected a folder"):
        train_medqa.prepare(parse(flags(model, tmp_path / "rows", tmp_path / "none", tmp_path)))


def test_the_summary_counts_images(folder, tmp_path, seeing):
    _, tokenizer, model = seeing
    file = _file(tmp_path, {"question": "What is it?", "answer": "A scan.", "images": ["a.png", "b.png"]})
    found = corpus.load(parse(flags(model, file, folder, tmp_path)), tokenizer, None)
    assert "2 images in 1 rows" in found.summary and " x " in found.first_row


def test_unknown_keys_are_counted_and_images_are_none_of_them(folder):
    ignored: Counter[str] = Counter()
    rows.usable(folder)({"instruction": "W?", "output": "A.", "images": ["a.png"], "note": 1}, ignored)
    assert ignored == Counter({"note": 1})
