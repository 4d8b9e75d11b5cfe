"""Are likelihoods of options those of one row at a time, accuracies lm-eval's, and what was trained on all right?"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from medqa_runs import needs_shared, tiny_llama, to_flags, write_talker
from paths import SHARED
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train_medqa
from zerolite import DataError, cli
from zerolite.medqa import layouts, rows
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.evaluation import choices
from zerolite.medqa.evaluation.choices import WAYS, Question
from zerolite.medqa.evaluation.measure import Work, measure
from zerolite.medqa.generation import Settings
from zerolite.medqa.opening import open_model
from zerolite.medqa.processes import Processes
from zerolite.medqa.template import choose

ROWS = [
    {"question": "Which helps against a cough?", "options": {"A": "honey", "B": "sand", "C": "salt"}, "answer": "A"},
    {
        "question": "感冒应该怎么办？",
        "options": {"A": "多喝水", "B": "不睡觉", "C": "多喝水吧", "D": "喝酒"},
        "answer": "A",
    },
    {
        "question": "Does it work?",
        "context": "We tried it on 40 patients. " * 6,
        "options": {"A": "Yes", "B": "No", "C": "Maybe"},
        "answer": "C",
    },
    {"question": "Pick.", "options": "(A) one\n(B) two three four\n(C) <|im_end|>\n(D) 4\n(E) five", "answer": "(B)"},
]
QUESTIONS = [Question(layouts.choice_of(row)) for row in ROWS]
ONE = Processes(0, 1, torch.device("cpu"))


def work(questions: list[Question], batch_rows: int = 4, cutoff_len: int = 2048) -> Work:
    return Work([], [], questions, [], batch_rows, cutoff_len, Settings(max_new_tokens=4))


def by_plain_loop(model, tokenizer, question: str, continuation: str) -> float:
    """Log-likelihood as one would write it down: the template's prompt, the text behind it, one row, fp64."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    assert whole[: len(ids)] == ids
    with torch.no_grad():
        found = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(found[place - 1, whole[place]].item() for place in range(len(ids), len(whole)))


@pytest.mark.parametrize("template", ["zerolite", "alpaca"])
def test_likelihoods_are_those_of_a_plain_loop(template, tmp_path):
    """Batched, padded, with options that share all but their last token; a special token's name is text."""
    opened = open_model(write_talker(tmp_path), wanted_template=template)
    found = measure(opened, work(QUESTIONS), "", ONE)
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    choose(tokenizer, template)
    num_forwards = 0
    for way in WAYS:
        for number, question in enumerate(QUESTIONS):
            num_forwards += len(choices.candidates(question, way, opened.tokenizer, opened.room).scored)
            texts = question.continuations(way)
            expected = [by_plain_loop(opened.model, tokenizer, question.asked(way), text) for text in texts]
            values = found.choices[way][number]["log_likelihoods"]
            assert values == pytest.approx(expected, abs=1e-5), (way, number)
    assert num_forwards < sum(2 * len(q.choice.options) for q in QUESTIONS) - 8  # letters need one forward a question
    assert not any(found.num_shortened.values())


def test_choices_by_character_and_by_byte_are_lm_evals():
    """lm_eval/api/task.py, 0.4.13: np.argmax of lls, of lls / len(choice), of lls / len(choice.encode("utf-8"))."""
    rng = np.random.default_rng(0)
    mixed = {"question": "?", "options": {"A": "维生素", "B": "vitamin", "C": "vitamin C 片"}, "answer": "A"}
    asked, seen = [*QUESTIONS, Question(layouts.choice_of(mixed))], set()
    for _ in range(300):
        question = asked[rng.integers(len(asked))]
        lls = -rng.exponential(5, len(question.choice.options)) * rng.integers(1, 9, len(question.choice.options))
        options = [option.strip() for option in question.choice.options.values()]
        expected = {
            "acc": int(np.argmax(lls) == question.gold),
            "acc_norm": int(np.argmax(lls / np.array([float(len(i)) for i in options])) == question.gold),
            "acc_bytes": int(np.argmax(lls / np.array([float(len(i.encode())) for i in options])) == question.gold),
        }
        assert choices.is_right(question, "text", lls.tolist()) == expected
        seen.add(tuple(expected.values()))
    assert len(seen) >= 5 and any(norm != by_byte for _, norm, by_byte in seen)


def test_the_trained_answer_begins_with_the_scored_letter_and_asks_the_same():
    for row, question in zip(ROWS, QUESTIONS, strict=True):
        trained = rows.conversation(layouts.as_own(row))
        asked, answer = trained.turns[0]
        assert asked == question.asked("letter")
        assert answer.startswith(question.continuations("letter")[question.gold])
        assert answer.endswith(question.continuations("text")[question.gold])


def test_kinds_are_apart_and_the_majority_is_of_letters_or_of_yes_no_and_maybe():
    def question(options: str, answer: str, text: str = "Q?") -> Question:
        letters = dict(zip("ABCDE", options.split(","), strict=False))
        return Question(layouts.choice_of({"question": text, "options": letters, "answer": answer}))

    asked = [question("Yes,No,Maybe", "A"), question("No,Yes,Maybe", "B"), question("Maybe,No,Yes", "A")]
    asked += [question("a,b,c,d", "B"), question("a,b,c,d", "B"), question("a,b,c,d", "C"), question("a,b,c,d,e", "E")]
    asked += [question("甲,乙,丙,丁", "A", "哪个？")]
    found = choices.groups(asked)
    assert found == {
        ("4 options", "en"): [3, 4, 5],
        ("4 options", "zh"): [7],
        ("5 options", "en"): [6],
        ("yes/no/maybe", "en"): [0, 1, 2],
        ("all", "all"): [*range(8)],
    }
    assert choices.majority(asked[:3]) == 2 / 3 and choices.majority(asked[3:6]) == 2 / 3
    assert choices.by_chance(asked[:3]) == pytest.approx(1 / 3) and choices.by_chance(asked[6:7]) == 1 / 5


def test_a_question_that_is_too_long_loses_its_beginning_and_is_counted(tmp_path):
    opened = open_model(write_talker(tmp_path))
    found = measure(opened, work(QUESTIONS, cutoff_len=64), "", ONE)
    assert found.num_shortened == {"choices by letter": 1, "choices by text": 1}
    with pytest.raises(ValueError, match="no room"):
        choices.candidates(QUESTIONS[3], "text", opened.tokenizer, 16)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, "expected `question`, `options` and `answer`"),
        ({"question": "a", "options": {"A": "x"}, "answer": "A"}, "at least two"),
        ({"question": "a", "options": {"A": "x", "B": ""}, "answer": "A"}, "a text for each letter"),
        ({"question": "a", "options": {"A": "x", "B": "y"}, "answer": "C"}, "a letter of A, B"),
        ("text", "expected `question`"),
    ],
)
def test_a_row_that_is_no_question_is_named_or_counted(row, reason, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (ROWS[0], row)))
    with pytest.raises(DataError, match="q.jsonl, line 2: ") as raised:
        choices.read(file, False, None)
    assert reason in str(raised.value)
    found, rejected = choices.read(file, True, None)
    assert len(found) == 1 and rejected[0].line == 2
    assert len(choices.read(file, False, 1)[0]) == 1


# --- what was trained on is right -----------------------------------------------------------------------------------


def accuracy_after_training(file, base, folder, **options) -> tuple[float, float]:
    """(by letter, before and after) of the questions in `file`, by the two commands that a user has."""
    output = folder / "run"
    flags = {"model_name_or_path": base, "train_file": file, "output_dir": output, "lr_scheduler_type": "constant"}
    assert train_medqa.train(train_medqa.prepare(parse(to_flags({**flags, **options})))) == 0
    arguments = ["--choices", file, "--output_dir", folder / "evaluation", "--base", base, "--max_new_tokens", 1]
    assert cli.main(["evaluate", str(output), *map(str, arguments)]) == 0
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    right = {of: [one[of]["letter"]["right"]["acc"] for one in found["questions"]] for of in ("base", "model")}
    return tuple(sum(values) / len(values) for values in right.values())


def test_questions_that_were_trained_on_are_right(tmp_path, capsys):
    """24 of them, made up, so that nothing but training tells the answers: template, labels and scores fit together."""
    rng, file, base = random.Random(0), tmp_path / "q.jsonl", tmp_path / "base"
    words = "fever cough rash pain sleep water tea salt honey bread milk 发热 咳嗽 皮疹 疼痛 睡眠".split()
    written = []
    for number in range(24):
        options = dict(zip("ABCDE", rng.sample(words, 4 + number % 2), strict=False))
        asked = " ".join(rng.sample(words, 3))
        written.append({"question": f"{asked}?", "options": options, "answer": rng.choice(list(options))})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    tiny_llama().save_pretrained(base)
    AutoTokenizer.from_pretrained(CORPUS / "tokenizer").save_pretrained(base)
    sizes = {"per_device_train_batch_size": 24, "max_steps": 120, "learning_rate": 1e-2, "cutoff_len": 160}
    before, after = accuracy_after_training(file, base, tmp_path, **sizes, save_steps=1000, validation_file=file)
    assert before < 0.6 and after == 1, (before, after)


@pytest.mark.slow
@needs_shared
@pytest.mark.timeout(3600)
def test_at_least_95_of_100_of_200_real_questions_that_were_trained_on_are_right(tmp_path, capsys):
    file, base = tmp_path / "q.jsonl", tmp_path / "base"
    lines = (SHARED / "medqa" / "mcq.jsonl").read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([line for line in lines if "PubMedQA" not in line][:200]) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=1024, **sizes))
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(CORPUS / "tokenizer").save_pretrained(base)
    options = {"per_device_train_batch_size": 20, "num_train_epochs": 40, "learning_rate": 1e-3, "cutoff_len": 512}
    before, after = accuracy_after_training(file, base, tmp_path, **options, save_steps=10000, validation_file=file)
    assert before < 0.5 and after >= 0.95, (before, after)
