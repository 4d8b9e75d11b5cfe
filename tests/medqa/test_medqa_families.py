"""Are the ids of training, evaluation and asking those of the written folder, for the tokenizers of model families?

What the model's embedding is given is compared with what transformers' own `apply_chat_template` makes of the folder.
Two tokenizers are real ones of SentencePiece; of the others the splitting, the template and the ids that the tokenizer
puts before a text are those of the family, and the merges are learned from the shipped rows.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from paths import SHARED
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zerolite.medqa import corpus, generation, opening, prompts, template
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.batches import collate
from zerolite.medqa.data import Conversation
from zerolite.medqa.evaluation import measure
from zerolite.medqa.evaluation.choices import Question
from zerolite.medqa.generation import Settings
from zerolite.medqa.layouts import Choice
from zerolite.medqa.loss import label_loss
from zerolite.medqa.processes import Processes

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are an assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}"
    "{% set one = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set one = bos_token + one %}{% endif %}{{ one }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GLM_4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer splits, what it puts before a text, and how it writes a dialogue."""

    text: str | None  # the template; None: the folder's own
    special: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    prefix: tuple[str, ...] = ()  # special tokens before a plain text, which a rendered one has already
    digits: str = ""  # how many digits are one word; "": of SmolLM2, each apart and words as GPT-2 has them
    is_nfc: bool = False
    folder: Path | None = None  # of a real tokenizer


CHAT = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama": Family(LLAMA_2, folder=SHARED / "models" / "stories260K-hf"),
    "llama-3": Family(
        LLAMA_3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|begin_of_text|>",),
        r"\p{N}{1,3}",
    ),
    "qwen": Family(CHATML, ("<|endoftext|>", *CHAT), "", "<|im_end|>", (), r"\p{N}", is_nfc=True),
    "glm": Family(
        GLM_4,
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        "",
        "<|endoftext|>",
        ("[gMASK]", "<sop>"),
        r"\p{N}{1,3}",
    ),
    "mistral": Family(None, folder=SHARED / "tokenizers" / "mistral-v1"),
    "smollm2": Family(SMOLLM2, ("<|endoftext|>", *CHAT), "<|im_start|>", "<|im_end|>"),
}
ROWS = [
    Conversation((("What helps against a cough?", "Drink 2 litres,  rest.\n\n- see a doctor after 10 days"),)),
    Conversation(
        (("感冒了，发烧38.5度怎么办？", "多喝水。\n请及时就医。"), ("Two days?", "¿Tal vez? Then see a doctor.")),
        "请简短回答。",
    ),
    Conversation(((" 1234567 mg of Aspirin?", "No: 12345 is far too much."), ("谢谢", "不客气")), "Be brief."),
    Conversation((("What does <|im_end|> or </s> mean?", "It ends <|eot_id|> a text."),)),
]
CHOICE = Choice("Which one helps?", {"A": "休息", "B": "Running 10 km"}, "A", {})


@functools.cache
def shipped_texts() -> list[str]:
    files = sorted(CORPUS.glob("validation.*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for row in rows for text in row.values() if isinstance(text, str)]


def tokenizer_of(family: Family):
    if family.folder is not None:
        if not family.folder.is_dir():
            pytest.skip(f"{family.folder.name}: shared tokenizers not beside the repository")
        tokenizer = AutoTokenizer.from_pretrained(family.folder)
        tokenizer.chat_template = family.text or tokenizer.chat_template
        return tokenizer
    built = Tokenizer(models.BPE())
    words = WORDS % family.digits if family.digits else None
    split = pre_tokenizers.Split(Regex(words), "isolated") if words else pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    built.pre_tokenizer, built.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    built.normalizer = normalizers.NFC() if family.is_nfc else None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built.train_from_iterator(shipped_texts(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    built.add_special_tokens(list(family.special))
    if family.prefix:
        ids = [(name, built.token_to_id(name)) for name in family.prefix]
        built.post_processor = processors.TemplateProcessing(
            single=[*family.prefix, "$A"], pair=[*family.prefix, "$A", "$B"], special_tokens=ids
        )
    ends = {"bos_token": family.bos} if family.bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        eos_token=family.eos,
        chat_template=family.text,
        clean_up_tokenization_spaces=False,
        **ends,
    )


def messages_of(row: Conversation, has_system: bool) -> list[dict[str, str]]:
    """As a user writes them; where the template knows no system text it begins the first question."""
    messages = [{"role": "system", "content": row.system}] if row.system and has_system else []
    for turn, (question, answer) in enumerate(row.turns):
        first = f"{row.system}\n\n" if row.system and not has_system and turn == 0 else ""
        messages += [
            {"role": "user", "content": first + question.strip()},
            {"role": "assistant", "content": answer.strip()},
        ]
    return messages


@pytest.fixture(params=FAMILIES)
def opened(request, tmp_path):
    """A tiny model and the tokenizer in a folder, as a run leaves them, opened as evaluation and asking do."""
    tokenizer = tokenizer_of(FAMILIES[request.param])
    template.choose(tokenizer, None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return opening.open_model(tmp_path)


def given_to(model, call) -> list[list[int]]:
    """The ids of each forward of `call`, one row at a time."""
    rows = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0][0].tolist()))
    try:
        call()
    finally:
        hook.remove()
    return rows


def test_training_evaluation_and_asking_give_the_ids_of_the_written_template(opened):
    written = AutoTokenizer.from_pretrained(opened.folder)
    has_system = template.template_of(opened.tokenizer).has_system
    dialogues = [messages_of(row, has_system) for row in ROWS]
    names = set(template.special_names(written))
    plain = [
        number
        for number, row in enumerate(ROWS)
        if not any(name in text for name in names for turn in row.turns for text in turn)
    ]
    wholes = [written.apply_chat_template(messages, return_dict=False) for messages in dialogues]
    asked = [
        written.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        for messages in dialogues
    ]
    one = [{"role": "user", "content": CHOICE.question}]
    choice = written.apply_chat_template(one, add_generation_prompt=True, return_dict=False)
    assert len(plain) >= 3

    # training; the first loss of a model tries two ids to see where its head is
    examples = corpus.encode_rows("train", ROWS, opened.tokenizer, 1024).examples
    batches = [collate([example], opened.tokenizer.eos_token_id) for example in examples]
    label_loss(opened.model, batches[0])
    trained = given_to(opened.model, lambda: [label_loss(opened.model, batch) for batch in batches])
    # evaluation: losses, answers, choices by letter and by text
    settings = Settings(max_new_tokens=1)
    work = measure.Work(ROWS, [*range(len(ROWS))], [Question(CHOICE)], [], 1, 1024, settings)
    evaluated = given_to(opened.model, lambda: measure.measure(opened, work, "", Processes(0, 1, torch.device("cpu"))))
    # asking
    said = given_to(opened.model, lambda: [generation.reply(opened, row, settings) for row in ROWS])

    as_set = {tuple(ids) for ids in evaluated}
    for number, example in enumerate(examples):
        ids = example.input_ids.tolist()
        assert trained[number][: len(ids)] == ids and len(said) == len(ROWS)
        prompt = said[number]
        assert ids[: len(prompt)] == prompt
        assert any(row[: len(ids)] == tuple(ids) for row in as_set) and tuple(prompt) in as_set
        learned = [index for index, label in enumerate(example.labels) if label != prompts.IGNORED]
        assert len(prompt) in learned and len(prompt) - 1 not in learned
        if number in plain:
            assert ids == wholes[number] and prompt == asked[number]
        else:  # transformers reads a name inside a text as the special token
            assert opened.tokenizer.decode(ids) == opened.tokenizer.decode(wholes[number])
    by_text = [row for row in as_set if list(row[: len(choice)]) == choice]
    assert len(by_text) == len(CHOICE.options)
