"""Are losses and gradients of packed rows those of the rows alone, in every model that packing accepts?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from medqa_runs import tiny_llama, to_flags
from models import assert_same_bits
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

import train_medqa
import zerolite
from zerolite.medqa import packing
from zerolite.medqa.arguments import CORPUS, parse
from zerolite.medqa.batches import collate, fingerprint
from zerolite.medqa.loss import label_loss
from zerolite.medqa.packing import packed
from zerolite.medqa.prompts import IGNORED, Example

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
NAMES = {  # of settings that a family spells otherwise
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, bos_token_id=0, eos_token_id=1),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "gpt_neox": dict(hidden_dropout=0.1),
    "mistral": dict(sliding_window=5),
    "gemma3_text": dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "bloom": dict(n_layer=2, n_head=4),
    "mamba": dict(state_size=4),
    "rwkv": dict(attention_hidden_size=32),
}


def model_of(family: str, **more) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**TINY | NAMES.get(family, {}) | more)
    return AutoModelForCausalLM.from_config(config)


def rows_of(*lengths: int, seed: int = 0) -> list[Example]:
    """Rows whose later half is learned; the last one throughout, as a passage is."""
    draw, rows = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        ids = draw.integers(2, 97, length, dtype=np.int32)
        begin = 1 if number + 1 == len(lengths) else max(length // 2, 1)
        rows.append(Example(ids, np.where(np.arange(length) >= begin, ids, IGNORED).astype(np.int32)))
    return rows


def loss_and_gradients(model: nn.Module, batches: list[list[Example]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = label_loss(model, collate(batch, pad_token_id=0))
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


ROWS = rows_of(9, 17, 3, 12, 2, 24)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma3_text", "opt", "gpt_neox"])
def test_losses_and_gradients_are_those_of_rows_alone(family, attention):
    """In fp64, in sequences of several lengths beside each other; also where a window is shorter than the rows."""
    model = model_of(family, attn_implementation=attention).double().eval()
    sequences = packed(ROWS, 30)
    assert 2 < len(sequences) < len(ROWS) and len({len(one.input_ids) for one in sequences}) > 1
    packing.check(model)
    alone, wanted = loss_and_gradients(model, [[row] for row in ROWS])
    together, found = loss_and_gradients(model, [sequences])
    is_fp64 = attention == "sdpa" and family != "gemma3_text"  # else softmax or norms are in fp32
    accuracy = 1e-10 if is_fp64 else 1e-6
    assert together == pytest.approx(alone, rel=accuracy)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=accuracy, atol=accuracy, msg=name)


def without_labels(example: Example, begin: int, end: int) -> Example:
    """Of a packed sequence the labels in [begin, end) alone."""
    inside = np.arange(len(example.labels))
    labels = np.where((inside >= begin) & (inside < end), example.labels, IGNORED).astype(np.int32)
    return Example(example.input_ids, labels, example.starts)


def test_each_row_has_its_own_loss():
    model = model_of("llama").double()
    (sequence,) = packed(ROWS[:4], 64)
    for row, start in zip(ROWS[:4], sequence.starts, strict=True):
        assert (sequence.input_ids[start : start + len(row.input_ids)] == row.input_ids).all()
        part = without_labels(sequence, start, start + len(row.input_ids))
        wanted = label_loss(model, collate([row], 0)).item()
        assert label_loss(model, collate([part], 0)).item() == pytest.approx(wanted, rel=1e-10)


def test_virtual_flash_attention_gets_one_sequence_and_where_rows_begin():
    """The kernel's arguments, carried out row by row: it needs a GPU."""
    model = model_of("llama").double()
    alone, wanted = loss_and_gradients(model, [[row] for row in ROWS])

    def flash(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **rest):
        assert attention_mask is None and query.shape[0] == 1 and rest["cu_seq_lens_k"] is cu_seq_lens_q
        assert cu_seq_lens_q.dtype == torch.int32 and int(cu_seq_lens_q.diff().max()) == max_length_q
        key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(states[:, :, begin:end] for states in (query, key, value)), is_causal=True, scale=scaling
            )
            for begin, end in zip(cu_seq_lens_q[:-1], cu_seq_lens_q[1:], strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("plain_flash", flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("plain_flash", flash_attention_mask)
    model.config._attn_implementation = "plain_flash"
    together, found = loss_and_gradients(model, [packed(ROWS, 30)])
    assert together == pytest.approx(alone, rel=1e-10)
    assert all(torch.allclose(found[name], gradient, rtol=1e-9) for name, gradient in wanted.items())


def test_models_that_do_not_keep_rows_apart_are_refused():
    """Without positions, with a state that goes from row to row, and with an attention that knows no mask."""
    for family in ("bloom", "mamba", "rwkv"):
        with pytest.raises(ValueError, match="--packing: \\w+ takes no position_ids"):
            packing.check(model_of(family))
    model = model_of("llama")

    def sees_all(module, query, key, value, attention_mask, scaling, **rest):
        key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
        causal = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return causal.transpose(1, 2), None

    AttentionInterface.register("sees_all", sees_all)
    model.config._attn_implementation = "sees_all"
    with pytest.raises(ValueError, match="LlamaForCausalLM lets tokens of one row see another row"):
        packing.check(model)

    class Counting(type(model_of("gpt2"))):  # its positions go on from row to row
        def forward(self, input_ids, position_ids=None, **rest):
            return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **rest)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="in Counting a row's loss depends on where it stands"):
        packing.check(Counting(model_of("gpt2").config).train())


def test_the_check_draws_nothing_and_leaves_the_model_as_it_was():
    for family, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float16), ("qwen2", torch.float32)):
        model = model_of(family).to(dtype).train()
        model.lm_head.eval()
        state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
        packing.check(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 30))
def test_every_row_is_in_one_sequence_and_none_is_cut(lengths, more):
    length = max(lengths) + more
    rows = rows_of(*lengths, seed=len(lengths))
    sequences = packed(rows, length)
    found = []
    for one in sequences:
        assert len(one.input_ids) <= length and one.starts[0] == 0
        ends = [*one.starts[1:], len(one.input_ids)]
        found += [one.input_ids[start:end].tolist() for start, end in zip(one.starts, ends, strict=True)]
        assert all(one.labels[start] == IGNORED for start in one.starts)
    assert sorted(found) == sorted(row.input_ids.tolist() for row in rows)
    assert sum(one.num_labels for one in sequences) == sum(row.num_labels for row in rows)
    assert fingerprint(packed(rows, length)) == fingerprint(sequences)  # a resumed run packs the same
    assert len(sequences) == len(rows) or fingerprint(sequences) != fingerprint(rows)  # or is refused
    assert sum(2 * len(one.input_ids) <= length for one in sequences) <= 1  # two half empty ones would be one


def test_positions_begin_again_at_each_row_and_at_the_padding():
    batch = collate([*packed(ROWS[2:4] + ROWS[4:5], 17), ROWS[0]], pad_token_id=9)
    assert "attention_mask" not in batch
    for positions, example in zip(batch["position_ids"], [*packed(ROWS[2:4] + ROWS[4:5], 17), ROWS[0]], strict=True):
        starts = sorted({*example.starts, len(example.input_ids)} - {17})
        assert (positions == 0).nonzero().flatten().tolist() == starts
        assert set(positions.diff().tolist()) <= {1, *(-int(positions[start - 1]) for start in starts[1:])}


def arguments(model: Path, output: Path, **options) -> list[str]:
    files = {"model_name_or_path": model, "tokenizer_name_or_path": CORPUS / "tokenizer", "output_dir": output}
    return to_flags({**files, "max_samples": 20, "cutoff_len": 160, "packing": True, "logging_steps": 1, **options})


def trained(argv: list[str]) -> tuple[dict[str, torch.Tensor], str]:
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    with zerolite.full_params(run.model):
        return {name: value.detach().clone() for name, value in run.model.named_parameters()}, run.corpus.summary


def test_a_packed_run_goes_on_where_it_stopped_and_takes_fewer_steps(ranks, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    options = dict(stage=3, max_steps=3, save_steps=2, per_device_train_batch_size=2)
    (straight, summary), _ = ranks(2).run(trained, arguments(tmp_path / "tiny", tmp_path / "a", **options))
    (told,) = [line for line in summary.splitlines() if line.startswith("packed: ")]
    num_rows, num_sequences = (int(told.split()[index]) for index in (1, 4))
    assert num_rows == 60 and num_sequences < 60 and "without --packing" in told
    options["resume"] = tmp_path / "a" / "checkpoint-2"
    (resumed, _), _ = ranks(2).run(trained, arguments(tmp_path / "tiny", tmp_path / "b", **options))
    assert_same_bits(resumed, straight)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)


def test_virtual_tokens_are_refused_by_name(tmp_path):
    for kind in ("prompt", "prefix", "p-tuning", "p-tuning-v2"):
        with pytest.raises(ValueError, match=f"--packing: virtual tokens of --finetuning_type {kind} stand before"):
            parse(["--model_name_or_path", str(tmp_path), "--finetuning_type", kind, "--packing"])
    assert parse(["--model_name_or_path", str(tmp_path), "--finetuning_type", "lora", "--packing"]).packing
