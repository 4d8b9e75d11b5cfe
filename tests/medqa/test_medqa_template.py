"""A model's own chat template is trained in, marked and written; one that cannot be trained with is refused by name."""

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from zerolite.medqa import model, template
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation
from zerolite.medqa.prompts import IGNORED, encode, first_prompt

TURNS = ("Cough?", "Drink."), ("Fever 38?", "See a doctor."), ("谢谢", "不客气。")
SYSTEM = "Be brief."

# Templates with the shapes of those that models come with: (special tokens, end of an answer, EOS, template).
LLAMA_3 = (
    ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "<|eot_id|>",
    "<|end|>",
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
)
QWEN = (
    ["<|im_start|>", "<|im_end|>"],
    "<|im_end|>",
    "<|im_end|>",
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}\n"
    "{%- for m in messages %}\n{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}\n",
)
GLM = (
    ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"],
    "<|end|>",
    "<|end|>",
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
)
MISTRAL = (
    ["[INST]", "[/INST]"],
    "<|end|>",
    "<|end|>",
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
)


def tokenizer_with(special: list[str], eos: str, text: str):
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token = eos
    tokenizer.chat_template = text
    return tokenizer


def messages_of(row: Conversation, is_folded: bool) -> list[dict[str, str]]:
    head = [{"role": "system", "content": row.system}] if row.system and not is_folded else []
    first = f"{row.system}\n\n" if row.system and is_folded else ""
    return head + [
        {"role": role, "content": first * (index == 0 and role == "user") + text}
        for index, turn in enumerate(row.turns)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


@pytest.mark.parametrize("kind", [LLAMA_3, QWEN, GLM, MISTRAL], ids=["llama-3", "qwen", "glm", "mistral"])
def test_what_is_trained_is_what_the_written_template_gives(kind, tmp_path):
    """Ids and prompts of transformers' own rendering of the written folder, with and without a system text."""
    special, end, eos, text = kind
    tokenizer = tokenizer_with(special, eos, text)
    told = template.choose(tokenizer, None)
    assert told.startswith("chat template: the model's own")
    tokenizer.save_pretrained(tmp_path)
    written = AutoTokenizer.from_pretrained(tmp_path)
    for num_turns in (1, 2, 3):
        for system in ("", SYSTEM):
            row = Conversation(TURNS[:num_turns], system)
            messages = messages_of(row, is_folded=kind is MISTRAL)
            (example,), _ = encode([row], tokenizer, 512)
            whole = written.apply_chat_template(messages, return_dict=False)
            assert example.input_ids.tolist() == whole
            learned = tokenizer.decode(example.input_ids[example.labels != IGNORED])
            assert all(answer in learned for _, answer in row.turns)
            assert not any(question in learned for question, _ in row.turns)
            assert learned.endswith(row.turns[-1][1] + end)
            asked = messages[: 2 + len(messages) % 2]
            prompt = written.apply_chat_template(asked[:-1], add_generation_prompt=True, return_dict=False)
            assert first_prompt(row, tokenizer, 512).ids == prompt
    assert template.template_of(tokenizer).end_token_id == tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("kind", [LLAMA_3, MISTRAL], ids=["llama-3", "mistral"])
def test_marks_of_the_written_template_are_the_labels(kind, tmp_path):
    """What trl's assistant_only_loss reads; the template had none."""
    special, _, eos, text = kind
    tokenizer = tokenizer_with(special, eos, text)
    assert "with marks around the answers" in template.choose(tokenizer, "own")
    row = Conversation(TURNS)
    got = tokenizer.apply_chat_template(messages_of(row, False), return_dict=True, return_assistant_tokens_mask=True)
    (example,), _ = encode([row], tokenizer, 512)
    assert got["assistant_masks"] == (example.labels != IGNORED).astype(int).tolist() and any(got["assistant_masks"])


def test_an_answer_that_the_template_leaves_open_is_closed():
    special, _, eos, text = GLM
    tokenizer = tokenizer_with(special, eos, text)
    assert "with the EOS token after the last answer" in template.choose(tokenizer, None)
    messages = messages_of(Conversation(TURNS[:2]), False)
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("See a doctor.<|end|>")
    assert "<|end|>" not in tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)


# A file's own; {} stands before a text.
PLAIN = (
    "{{% for m in messages %}}{{{{ m.role + '{0}' + m.content }}}}{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}"
    "{{% endif %}}\n{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'assistant{0}' }}}}{{% endif %}}"
)


@pytest.mark.parametrize("name", ["zerolite", "alpaca", "file"])
def test_a_template_can_be_named(name, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN.format(":\n"), encoding="utf-8")
    special, _, eos, text = QWEN
    tokenizer = tokenizer_with(special, eos, text)
    told = template.choose(tokenizer, str(path) if name == "file" else name)
    assert told.startswith(f"chat template: {path if name == 'file' else name}")
    (example,), _ = encode([Conversation(TURNS, SYSTEM)], tokenizer, 512)
    shown = {"zerolite": "### Answer:\nDrink.<", "alpaca": "### Response:\nDrink.<", "file": "assistant:\nDrink.<"}[
        name
    ]
    assert shown in tokenizer.decode(example.input_ids)
    assert (
        tokenizer.decode(example.input_ids[example.labels != IGNORED]).replace(eos, "") == "Drink.See a doctor.不客气。"
    )


def test_an_answer_that_merges_with_its_prompt_is_refused():
    """Behind a space, "Drink" would be asked for with another token than it was trained with."""
    tokenizer = tokenizer_with([], "<|end|>", PLAIN.format(": "))
    template.choose(tokenizer, None)
    with pytest.raises(ValueError, match="the answer 'Drink.' merges with what stands before it"):
        encode([Conversation(TURNS)], tokenizer, 512)


BACKWARDS = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
COUNTED = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for m in messages %}{{ m.content }", "the chat template fails: TemplateSyntaxError"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out or repeats a text"),
        (BACKWARDS, "leaves out or repeats a text"),
        (COUNTED, "not the beginning of its dialogue"),
    ],
    ids=["syntax", "no answers", "backwards", "no prefix"],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_with_is_refused(text, message):
    tokenizer = tokenizer_with([], "<|end|>", text)
    with pytest.raises(ValueError, match=f"--template own: .*{message}.*--template zerolite takes any tokenizer"):
        template.choose(tokenizer, None)
    template.choose(tokenizer, "zerolite")


def test_a_template_that_changes_a_text_is_refused_with_the_row():
    text = "{% for m in messages %}{{ m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    tokenizer = tokenizer_with([], "<|end|>", text)
    template.choose(tokenizer, None)
    with pytest.raises(ValueError, match="row 'b': the chat template changes the texts of this row"):
        encode([Conversation((("a", "1"),)), Conversation((("b", "so</think>2"),))], tokenizer, 512)


def test_unknown_names_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    with pytest.raises(ValueError, match="--template chatml: expected own, zerolite, alpaca or a file"):
        template.choose(tokenizer, "chatml")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--template own: the tokenizer has no chat template"):
        template.choose(tokenizer, "own")


def test_a_model_stops_where_its_training_says_so(tmp_path):
    """EOS ids of both configurations hold the end of an answer; sampling flags do not stop the export."""
    special, _, eos, text = LLAMA_3
    tokenizer = tokenizer_with(special, eos, text)
    template.choose(tokenizer, None)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=7,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    llama.generation_config = GenerationConfig(eos_token_id=[7, 9], do_sample=False, temperature=0.6, top_p=0.9)
    model.align_ends(llama, tokenizer)
    llama.save_pretrained(tmp_path)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.eos_token_id == [end, tokenizer.eos_token_id, 7, 9]
    assert LlamaConfig.from_pretrained(tmp_path).eos_token_id == [end, tokenizer.eos_token_id, 7]


def test_labels_begin_where_the_prompt_ends():
    """A space that the template writes before an answer is the model's to write."""
    special, _, eos, text = MISTRAL
    tokenizer = tokenizer_with(special, eos, text)
    template.choose(tokenizer, None)
    (example,), _ = encode([Conversation(TURNS[:1])], tokenizer, 512)
    first = int(np.flatnonzero(example.labels != IGNORED)[0])
    assert tokenizer.decode(example.input_ids[first:]) == " Drink.<|end|>"
