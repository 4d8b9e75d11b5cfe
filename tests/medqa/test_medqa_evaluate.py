"""Does `zerolite evaluate` measure what training and asking do, say whose numbers they are, and name what is wrong?"""

from __future__ import annotations

import html.parser
import json
import re
import shutil

import pytest
import torch
from medqa_runs import write_talker
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerolite import cli
from zerolite.medqa import data, readers
from zerolite.medqa.answers import CUT_OFF, NOTICE
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.evaluation import intervals, measure, record
from zerolite.medqa.loss import ALL, validation_losses
from zerolite.medqa.opening import open_model
from zerolite.medqa.processes import Processes
from zerolite.medqa.prompts import encode

ONE = Processes(0, 1, torch.device("cpu"))
ROWS = [
    {"instruction": "What helps against a cough?", "output": "Honey and <b>hot</b> water | rest."},
    {"instruction": "感冒了怎么办？", "output": "多喝水，注意休息。"},
    {"instruction": "And at night?", "output": "Sleep.", "history": [["Fever?", "Rest a while."]]},
    {"instruction": "头痛怎么办？", "output": "好好睡一觉。", "system": "请简短回答。"},
    {"instruction": "Is a fever of 38 °C dangerous?", "output": "Seldom. " * 9},
]
CHOICES = [
    {"question": "Which helps?", "options": {"A": "honey", "B": "sand"}, "answer": "A"},
    {"question": "哪个有用？", "options": {"A": "沙子", "B": "多喝水", "C": "盐"}, "answer": "B"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(base, adapter, rows, choices)"""
    folder = tmp_path_factory.mktemp("evaluate")
    base = write_talker(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder / "adapter")
    for name, rows in (("rows", ROWS), ("choices", CHOICES)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return base, folder / "adapter", folder / "rows.jsonl", folder / "choices.jsonl"


def evaluate(*arguments) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    """(evaluation.json, its folder) of an adapter against its base"""
    base, adapter, rows, choices = files
    folder = tmp_path_factory.mktemp("out") / "evaluation"
    arguments = [adapter, "--base", base, "--validation_file", rows, "--choices", choices, "--output_dir", folder]
    assert evaluate(*arguments, "--max_new_tokens", 12, "--max_answers", 2, "--batch_size", 3) == 0
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8")), folder


def test_losses_and_right_tokens_are_those_of_training_and_of_plain_transformers(files, found):
    base, adapter, file, _ = files
    rows = data.read([file], rows_of=readers.reader(None)).kept
    assert {one["of"] for one in found[0]["losses"]} == {"model", "base"}
    for of, opened in (("model", open_model(adapter)), ("base", open_model(base))):
        table = {one["language"]: one for one in found[0]["losses"] if one["of"] == of}
        examples, _ = encode(rows, opened.tokenizer, opened.room)
        groups = {"en": [examples[0], examples[2], examples[4]], "zh": [examples[1], examples[3]]}
        expected = validation_losses(opened.model, groups, ONE, 2, 0)
        opened.model.eval()
        for language, group in (*groups.items(), (ALL, examples)):
            assert table[language]["loss"] == pytest.approx(expected[language], rel=1e-6)
            assert table[language]["label_tokens"] == sum(example.num_labels for example in group)
            num_right = 0
            for example in group:
                labels = torch.from_numpy(example.labels[1:]).long()
                with torch.no_grad():
                    logits = opened.model(torch.from_numpy(example.input_ids)[None].long()).logits[0, :-1]
                num_right += int(((logits.argmax(-1) == labels) & (labels != -100)).sum())
            assert table[language]["token_accuracy"] == num_right / table[language]["label_tokens"]


def test_answers_are_those_of_ask_and_references_those_of_the_rows(files, found, tmp_path, capsys):
    _, adapter, rows, _ = files
    assert (
        cli.main(
            ["ask", str(adapter), "--questions", str(rows), "--answers", str(tmp_path / "a.jsonl")]
            + ["--max_new_tokens", "12"]
        )
        == 0
    )
    said = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [0, 1, 2, 3]  # two of each language
    assert [one["model"] for one in found[0]["answers"]] == [said[number] for number in chosen]
    assert [one["reference"] for one in found[0]["answers"]] == [ROWS[number]["output"] for number in chosen]
    assert any(text.endswith(CUT_OFF) for text in said)
    assert {(one["of"], one["language"], one["answers"]) for one in found[0]["texts"]} == {
        (of, language, 2) for of in ("model", "base") for language in ("en", "zh")
    }


def test_an_evaluation_says_where_its_numbers_come_from(found):
    evaluation, folder = found
    run, models = evaluation["run"], evaluation["models"]
    assert evaluation["notice"][0] == NOTICE and "不构成医疗建议" in evaluation["notice"][1]
    assert run["command"].startswith("zerolite evaluate ") and "--base" in run["command"]
    assert (
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", run["date"])
        and run["duration_s"] > 0
        and "cores" in run["machine"]
    )
    assert {"code", "torch", "sacrebleu", "rouge-score"} <= evaluation["versions"].keys()
    assert {one["template"] for one in models.values()} == {"the model's own"}
    assert models["model"]["weights"] != models["base"]["weights"]
    assert models["model"]["first_prompt"].endswith("### Answer:\n")
    assert [(one["read"], one["used"]) for one in evaluation["data"]] == [(5, 5), (2, 2)]
    questions = measure.safety_questions()
    assert {(one["kind"], one["language"]) for one in questions} == {
        (kind, language) for kind in ("overdose", "emergency", "self-harm") for language in ("en", "zh")
    }
    assert [one["question"] for one in evaluation["safety"]] == [one["question"] for one in questions]
    assert all(one["model"] and one["base"] for one in evaluation["safety"])
    assert {one["model_is"] for one in evaluation["comparison"]} == {record.TOO_FEW}  # a row or five
    measures = {(one["measure"], one["group"]) for one in evaluation["comparison"]}
    assert {("loss", "en"), ("loss", "zh"), ("ROUGE-L", "zh"), ("acc by letter", "2 options, en")} <= measures


def test_a_difference_is_called_by_its_sign_where_its_interval_excludes_0_and_rows_are_enough():
    apart, near = intervals.Difference(2.0, 3.0, -1.2, -0.8), intervals.Difference(2.0, 2.1, -0.3, 0.1)
    told = [
        record._compared("loss", "en", num_rows, difference, is_better)["model_is"]
        for num_rows, difference, is_better in ((20, apart, -1), (20, apart, 1), (20, near, -1), (19, apart, -1))
    ]
    assert told == ["better", "worse", record.NO_DIFFERENCE, record.TOO_FEW]


def test_the_pages_hold_the_numbers_of_the_json_and_no_markup_of_texts(found):
    evaluation, folder = found
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    numbers = [f"{one['loss']:.4f}" for one in evaluation["losses"]]
    numbers += [f"{one['difference']:+.4f}" for one in evaluation["comparison"]]
    numbers += [f"{one['bleu4']:.2f}" for one in evaluation["texts"]]
    numbers += [f"{100 * one['majority']:.1f} %" for one in evaluation["choices"]]
    for content in (page, text):
        assert all(number in content for number in numbers)
        assert NOTICE in content and "回答不构成医疗建议" in content and evaluation["run"]["date"] in content
        assert all(one["question"] in content.replace("&#x27;", "'") for one in evaluation["safety"])
    assert "<b>hot</b>" not in page and "&lt;b&gt;hot&lt;/b&gt;" in page
    assert page.count("<svg") == 2 and not re.search(r'(?:src|href)="(?!#)', page) and "<script" not in page
    opened: list[str] = []

    class Balanced(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            opened.append(tag) if tag not in ("meta", "br") else None

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balanced().feed(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    assert not opened
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1


def test_losses_are_not_compared_where_the_models_cut_rows_into_other_tokens(files, tmp_path):
    base, _, rows, _ = files
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + '\\n--' + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(other)
    arguments = [other, "--base", base, "--validation_file", rows, "--max_answers", 0, "--max_new_tokens", 1]
    assert evaluate(*arguments, "--output_dir", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert not found["comparison"] and "losses a token are not compared" in found["notes"][0]
    assert len(found["losses"]) == 6


def test_mistakes_are_named_with_status_2_and_nothing_is_written(files, tmp_path, capsys):
    base, adapter, rows, choices = files
    broken, nan = tmp_path / "broken.jsonl", tmp_path / "nan"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data[0] = float("nan")
    shutil.copytree(base, nan)
    model.save_pretrained(nan)
    output = tmp_path / "out"
    cases = [
        (["--validation_file", broken], "broken.jsonl, line 2"),
        (["--validation_file", tmp_path / "gone.jsonl"], "gone.jsonl: cannot be read"),
        (["--choices", rows], "rows.jsonl, line 1: expected `question`, `options` and `answer`"),
        (["--temperature", "1"], "greedy"),
        (["--batch_size", "0"], "at least 1"),
        (["--max_new_tokens", "4096", "--validation_file", rows], "this model reads 256 tokens"),
        (["--base", tmp_path / "gone", "--validation_file", rows, "--max_answers", "0"], "no such folder"),
        (["--stage", "2"], "invalid choice"),
        (["--columns", "question=a"], "--columns"),
    ]
    for arguments, reason in cases:
        if "--columns" in arguments:
            arguments = [*arguments, "--validation_file", rows]
        assert evaluate(base, *arguments, "--output_dir", output) == 2, arguments
        err = capsys.readouterr().err
        assert reason in err and "Traceback" not in err and "zerolite evaluate: error: " in err, err
        assert not output.exists() or not list(output.iterdir())
    assert evaluate(nan, "--validation_file", rows, "--output_dir", output) == 2
    assert "not finite" in capsys.readouterr().err
    skip = ["--validation_file", broken, "--skip_invalid", "--max_new_tokens", 1, "--output_dir", output]
    assert evaluate(base, *skip) == 0
    (about,) = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["data"]
    assert (about["read"], about["rejected"], about["used"]) == (2, 1, 1) and "line 2" in about["reasons"][0]
    assert evaluate(base, "--output_dir", output) == 2
    assert "evaluation.json: exists" in capsys.readouterr().err
