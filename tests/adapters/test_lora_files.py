"""LoRA folders that PEFT opens, PEFT's that are opened here, and folders that are refused by name."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_models import (
    FAMILIES,
    VARIANTS,
    adapted,
    base,
    draw,
    logits_of,
    relative,
    targets_of,
    weigh,
)  # fmt: skip
from models import assert_same_bits
from safetensors.torch import load_file, save_file
from saved import tree
from torch import nn

import zerolite
from zerolite import ZeroliteError
from zerolite.adapters import files, lora_files
from zerolite.adapters.files import CONFIG, TENSORS, load, save
from zerolite.adapters.lora import add_lora, layers_of
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapters_of

peft = pytest.importorskip("peft", reason="adapters are exchanged with PEFT: pip install peft")

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def peft_model(family: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """PEFT's own model, every value of its adapter drawn."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets_of(family), "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base(family, dtype), peft.LoraConfig(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.empty(parameter.shape).normal_(generator=generator))
    return model.eval()


def peft_folder(folder: Path, **options) -> Path:
    peft_model(options.pop("family", "llama"), **options).save_pretrained(folder)
    return folder


def in_peft(folder: Path, family: str, **options) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(family), folder, autocast_adapter_dtype=False, **options).eval()


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        weigh(logits_of(model.train())).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# In both directions


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_folder_gives_the_same_logits_here(family, variant, tmp_path):
    """As made, and after training went on with what was opened, saved and opened in PEFT again."""
    theirs = peft_model(family, lora_dropout=0.1, **VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(base(family), tmp_path / "theirs")
    assert relative(logits_of(model), logits_of(theirs)) < 1e-13
    assert relative(logits_of(model), logits_of(base(family))) > 1e-2
    config = adapters_of(model).by_name["default"].config
    assert (config.r, config.alpha, config.dropout) == (4, 6, 0.1)
    train(model)
    save(model, tmp_path / "ours")
    assert relative(logits_of(in_peft(tmp_path / "ours", family)), logits_of(model)) < 1e-13
    assert relative(logits_of(model), logits_of(theirs)) > 1e-3


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_folder_gives_the_same_logits_in_peft(family, variant, targets, tmp_path):
    """Before and after training in PEFT, and back here."""
    options = VARIANTS[variant] | ({"targets": targets} if targets != "default" else {})
    model = adapted(family, **options)
    save(model, tmp_path / "ours")
    theirs = in_peft(tmp_path / "ours", family, is_trainable=True)
    assert relative(logits_of(theirs), logits_of(model)) < 1e-13
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert relative(logits_of(load(base(family), tmp_path / "theirs")), logits_of(theirs)) < 1e-13


PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 7}, "alpha_pattern": {"k_proj": 3, "^v_proj": 9}},
    "one block": {"layers_to_transform": 1},
    "some blocks": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "blocks and a whole name": {
        "layers_to_transform": [0],
        "target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"],
    },
    "all linear": {"target_modules": "all-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]},
    "pattern": {"target_modules": r".*\.1\..*(q|o|up)_proj"},
    "pattern but": {"target_modules": r".*(q|o)_proj", "exclude_modules": r".*layers\.0.*"},
    "more names than there are": {"target_modules": ["v_proj", "query_key_value"]},
    "rank-stabilised dora": {"use_rslora": True, "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "the wrong way round": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("what", PATTERNS)
def test_choices_of_pefts_configuration_mean_the_same(what, tmp_path):
    """Logits, and after saving here PEFT opens an adapter on the same layers."""
    theirs = peft_model("llama", **PATTERNS[what])
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(base("llama"), tmp_path / "theirs")
    assert relative(logits_of(model), logits_of(theirs)) < 1e-13
    save(model, tmp_path / "ours")
    assert relative(logits_of(in_peft(tmp_path / "ours", "llama")), logits_of(theirs)) < 1e-13
    assert_same_bits(load_file(tmp_path / "ours" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))


PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "12", "experts", "q_proj", "mlp"])
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)


@given(
    NAMES,
    st.lists(NAMES, min_size=1, max_size=2),
    st.one_of(st.integers(0, 2), st.lists(st.sampled_from([0, 1, 12]), max_size=2)),
    st.sampled_from([None, "layers", ["h", "layers"], []]),
)
@settings(max_examples=300, deadline=None)
def test_blocks_are_chosen_as_in_peft(name, targets, indices, lists):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets, layers_to_transform=indices, layers_pattern=lists)
    ours = lora_files._by_layers(targets, indices, lists or [])(name)
    assert ours == bool(check_target_module_exists(config, name))


@given(NAMES, st.dictionaries(st.sampled_from(["q_proj", r"0\..*", "^model.*mlp", "h", ".*"]), st.integers(1, 9)))
@settings(max_examples=200, deadline=None)
def test_ranks_are_chosen_as_in_peft(name, pattern):
    from peft.utils.other import get_pattern_key

    from zerolite.adapters.lora import LoraConfig

    assert LoraConfig(r=16, rank_pattern=pattern).rank_of(name) == pattern.get(get_pattern_key(pattern, name), 16)


def test_pefts_fp32_values_on_a_16_bit_base(tmp_path):
    """Values take the base's dtype; a file saved again holds just them."""
    peft_folder(tmp_path / "theirs", dtype=torch.float32)
    model = load(base("llama", torch.bfloat16), tmp_path / "theirs")
    save(model, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / TENSORS)
    assert_same_bits(load_file(tmp_path / "ours" / TENSORS), {key: value.bfloat16() for key, value in theirs.items()})


def test_two_adapters_are_saved_apart(tmp_path):
    """Each under its name, opened under another; the active one where no name is given."""
    model = adapted("llama")
    add_lora(model, r=2, targets="all-linear", name="second")
    draw(model, "second")
    save(model, tmp_path / "first", "default")
    save(model, tmp_path / "second")
    twin = load(load(base("llama"), tmp_path / "second", "a"), tmp_path / "first", "b")
    assert len(layers_of(twin, "a")) > len(layers_of(twin, "b"))
    assert torch.equal(logits_of(twin), logits_of(adapted("llama")))
    with pytest.raises(ValueError, match="'a' already"):
        load(twin, tmp_path / "first", "a")


# Writing


def test_a_folder_is_replaced_whole_and_other_files_stay(tmp_path):
    """Twice into one folder, beside a tokenizer's file; nothing is left next to it."""
    folder = tmp_path / "adapter"
    save(adapted("llama", use_dora=True), folder)
    (folder / "tokenizer.json").write_text("{}")
    save(adapted("llama", seed=3), folder)
    assert set(tree(folder)) == {CONFIG, TENSORS, "tokenizer.json"} and set(tree(tmp_path)) == {
        "adapter/",
        *(f"adapter/{name}" for name in tree(folder)),
    }
    assert torch.equal(logits_of(load(base("llama"), folder)), logits_of(adapted("llama", seed=3)))


def test_an_untrained_adapter_is_saved_with_a_warning(tmp_path):
    """Legal, but after a training it is the sign of one that learnt nothing."""
    with pytest.warns(UserWarning, match="every lora_B is zero"):
        save(add_lora(base("llama")), tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(adapted("llama"), tmp_path / "trained")
    assert torch.equal(logits_of(load(base("llama"), tmp_path / "new")), logits_of(base("llama")))


real = files.safetensors_file.write_safetensors


def fail(*args, **kwargs):
    raise OSError("no space left")


def other_bits(path, entries, tensors, metadata) -> None:
    """A disk that turns one bit."""
    real(path, entries, tensors, metadata)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def make_infinite(model: nn.Module) -> None:
    layers_of(model, "default")["model.layers.0.self_attn.q_proj"].lora["default"].lora_A.data.fill_(torch.inf)


@pytest.mark.parametrize(
    "break_it, text",
    [
        (
            lambda patch, model: patch.setattr(files.safetensors_file, "write_safetensors", other_bits),
            "other values than memory",
        ),
        (lambda patch, model: patch.setattr(files.safetensors_file, "write_safetensors", fail), "no space left"),
        (lambda patch, model: patch.setattr(files.files, "commit_folder", fail), "no space left"),
        (lambda patch, model: make_infinite(model), "q_proj.lora_A.weight of adapter 'default' holds NaN or Inf"),
    ],
    ids=["a bit", "no space", "no rename", "infinite"],
)
def test_what_cannot_be_saved_leaves_what_was_there(break_it, text, tmp_path, monkeypatch):
    """The error is raised, the old folder stands untouched, and nothing is left beside it."""
    folder = tmp_path / "adapter"
    save(adapted("llama"), folder)
    before, model = tree(tmp_path), adapted("llama", seed=3)
    break_it(monkeypatch, model)
    with pytest.raises((OSError, ZeroliteError), match=text):
        save(model, folder)
    assert tree(tmp_path) == before


def test_a_folder_with_folders_is_not_replaced(tmp_path):
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name in ("run", "file"):
        with pytest.raises(ValueError, match="no folder of files alone"):
            save(adapted("llama"), tmp_path / name)
    assert set(tree(tmp_path)) == {"run/", "run/checkpoint-10/", "file"}


# Refusals


def refused(folder: Path, family: str = "llama") -> str:
    """What `load` says; and it leaves the model as it was."""
    model = base(family)
    with pytest.raises(ValueError) as caught:
        load(model, folder)
    assert not hasattr(model, "_zerolite_adapters") and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits_of(model), logits_of(base(family)))
    return str(caught.value)


def edit(folder: Path, **entries) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | entries))
    return folder


UNSUPPORTED = {
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [1],
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "lora_bias": True,
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "corda_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa",
    "a_key_of_the_future": 1,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_keys_are_refused_by_name(key, tmp_path):
    text = refused(edit(peft_folder(tmp_path), **{key: UNSUPPORTED[key]}))
    assert f"{key}=" in text and str(UNSUPPORTED[key]) in text


@pytest.mark.parametrize("how", ["olora", "pissa_niter_4", "corda", "loftq", "lora_ga", "mica"])
def test_initial_values_that_are_of_another_base_are_refused(how, tmp_path):
    assert "init_lora_weights" in refused(edit(peft_folder(tmp_path), init_lora_weights=how))


def test_every_key_that_peft_has_is_read_or_off():
    """What PEFT writes for a plain adapter is accepted, whatever its version adds with a value that is off."""
    lora_files._refuse_unsupported(peft.LoraConfig(target_modules=["q_proj"]).to_dict() | {"new": None, "other": []})


@pytest.mark.parametrize(
    "key, value",
    [
        ("r", "8"), ("r", 0), ("lora_alpha", None), ("lora_dropout", 1.5), ("target_modules", 3),
        ("target_modules", []),
        ("target_modules", "(unclosed"), ("rank_pattern", ["q_proj"]), ("rank_pattern", {"(": 2}), ("use_dora", "yes"),
        ("rank_pattern", {"q_proj": -1}), ("layers_to_transform", "all"), ("exclude_modules", 1),
    ],
)  # fmt: skip
def test_values_that_peft_does_not_write_are_refused(key, value, tmp_path):
    folder = edit(peft_folder(tmp_path), **{key: value})
    if value is None:
        load(base("llama"), folder)  # as PEFT: its default
    else:
        assert key.removeprefix("lora_").split("_")[0] in refused(folder)


def test_a_minimal_configuration_means_pefts_defaults(tmp_path):
    """r 8, alpha 8, no dropout; not zerolite's own."""
    theirs = peft_model("llama", r=8, lora_alpha=8)
    theirs.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": targets_of("llama")}))
    assert relative(logits_of(load(base("llama"), tmp_path)), logits_of(theirs)) < 1e-13


def resave(folder: Path, change) -> Path:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return folder


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda tensors: tensors.pop(KEY), f"no {KEY}"),
        (lambda tensors: tensors.update(foreign=torch.ones(2)), "foreign, which has no place"),
        (lambda tensors: tensors.update({KEY: torch.ones(8, 3)}), rf"{KEY} of shape \(8, 3\) instead of \(8, 4\)"),
        (
            lambda tensors: tensors.update({KEY: torch.ones(8, 4, dtype=torch.int8)}),
            f"{KEY} of {TENSORS} is of dtype I8",
        ),
    ],
    ids=["missing", "extra", "shape", "integers"],
)
def test_tensors_of_another_adapter_are_named(change, text, tmp_path):
    assert re.search(text, refused(resave(peft_folder(tmp_path), change)))


def test_another_models_adapter_is_named(tmp_path):
    """GPT-2's on LLaMA has no layers there; LLaMA's on Qwen 2 with other blocks misses tensors."""
    assert "c_attn" in refused(peft_folder(tmp_path / "gpt2", family="gpt2"))
    folder = peft_folder(tmp_path / "one", layers_to_transform=1)
    assert "no base_model.model.model.layers.0" in refused(edit(folder, layers_to_transform=None), "qwen2")


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-7]), "truncated"),
        (lambda folder: (folder / TENSORS).write_bytes(b"\x80\x04."), "truncated or no safetensors"),
        (lambda folder: (folder / TENSORS).write_bytes(b""), "truncated or no safetensors"),
        (lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"), "only a pickle"),
        (lambda folder: (folder / TENSORS).unlink(), f"no {TENSORS}"),
        (lambda folder: (folder / CONFIG).unlink(), f"no {CONFIG}"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": "LO'), "is no JSON"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "is no JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "peft_type None"),
        (lambda folder: edit(folder, peft_type="IA3"), "peft_type 'IA3': supported are LORA, PROMPT_TUNING"),
        (lambda folder: edit(folder, peft_type=["LORA"]), "peft_type"),
    ],
)
def test_damaged_folders_are_refused(damage, text, tmp_path):
    damage(peft_folder(tmp_path))
    assert text in refused(tmp_path)


# Sharded


def save_and_load(folder: Path, stage: int, offload, options: dict):
    """Train one step, save, spoil the adapter, load it again; logits at each point."""
    model = adapted("llama", torch.float32, **options).train()
    model = zerolite.shard(model, stage, offload=offload)
    optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    weigh(logits_of(model)).backward()
    optimizer.step()
    optimizer.zero_grad()
    save(model, folder)
    with torch.no_grad():
        results = [logits_of(model.eval())]
        other = folder.with_name("other")
        if dist.get_rank() == 0:
            save(adapted("llama", torch.float32, seed=8, **options), other)
        dist.barrier()
        load(model, other)
        results.append(logits_of(model))
        load(model, folder)
        results.append(logits_of(model.eval()))
    weigh(logits_of(model)).backward()  # what was loaded reached what is stepped
    optimizer.step()
    with zerolite.full_params(model):
        stepped = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    weigh(logits_of(model)).backward()
    optimizer.step()
    load(model, folder)  # while workers are stepping what is written to
    results.append(logits_of(model).detach())
    return results, stepped


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_sharded_adapters_are_saved_and_loaded(ranks, stage, offload, variant, tmp_path):
    """Two ranks: the folder holds the trained adapter, PEFT opens it, and loading it brings its logits back."""
    answers = ranks(2).run(save_and_load, tmp_path / "adapter", stage, offload, VARIANTS[variant])
    theirs = peft.PeftModel.from_pretrained(base("llama", torch.float32), tmp_path / "adapter").eval()
    other = load(base("llama", torch.float32), tmp_path / "other")
    for (saved, loaded, again, after_a_step), stepped in answers:
        assert torch.equal(saved, again) and torch.equal(saved, after_a_step)
        assert relative(saved, logits_of(theirs)) < 1e-5
        assert torch.equal(loaded, logits_of(other)) and relative(saved, loaded) > 1e-2
        assert_same_bits(stepped, answers[0][1])
        assert all(value.isfinite().all() for value in stepped.values())


def load_wrong(folder: Path, stage: int, what: str):
    model = zerolite.shard(adapted("llama", torch.float32), stage)
    before = logits_of(model)
    if what == "broken here" and dist.get_rank() == 1:
        folder = folder / "nowhere"
    try:
        load(model, folder)
    except ZeroliteError as error:
        return str(error), torch.equal(before, logits_of(model))


@pytest.mark.parametrize(
    "what, options, text",
    [
        ("rank", {"r": 3}, "of shape"),
        ("alpha", {"lora_alpha": 5}, "scale of model.layers.0.self_attn.q_proj"),
        ("layers", {"target_modules": ["q_proj"]}, "no base_model"),
        ("dora", {"use_dora": True}, "no place"),
        ("broken here", {}, "rank 1: ValueError"),
    ],
)
def test_another_adapter_is_not_loaded_into_a_sharded_model(ranks, what, options, text, tmp_path):
    """Every rank raises, also where only one cannot read, and the adapter is as it was."""
    peft_folder(tmp_path, dtype=torch.float32, **options)
    for message, is_unchanged in ranks(2).run(load_wrong, tmp_path, 2, what):
        assert text in message and is_unchanged


def save_nowhere(folder: Path):
    model = zerolite.shard(adapted("llama", torch.float32), 2)
    try:
        save(model, folder)
    except ZeroliteError as error:
        return str(error)


def test_every_rank_hears_that_rank_0_could_not_save(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for message in ranks(2).run(save_nowhere, tmp_path / "file" / "adapter"):
        assert "saving adapter 'default'" in message and "rank 0" in message


def prompt_on_rank(folder: Path, encoder: str | None):
    kind = "p-tuning" if encoder else "prompt"
    model = zerolite.shard(add_prompt(base("llama", torch.float32), kind, tokens=3, encoder=encoder), 2)
    if not encoder:
        save(model, folder.with_name("ours"))
    try:
        load(model, folder)
    except ZeroliteError as error:
        return str(error)
    return logits_of(model).detach()


@pytest.mark.parametrize("encoder", [None, "mlp"])
def test_prompts_go_the_same_way(ranks, tmp_path, encoder):
    """Saved from two ranks, and loaded into a sharded prompt; one with an encoder says why it cannot be."""
    kind = peft.PromptEncoderConfig if encoder else peft.PromptTuningConfig
    theirs = peft.get_peft_model(base("llama", torch.float32), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    for answer in ranks(2).run(prompt_on_rank, tmp_path / "theirs", encoder):
        if encoder:
            assert "without an encoder" in answer
        else:
            assert relative(answer, logits_of(theirs)) < 1e-6
            assert set(tree(tmp_path / "ours")) == {CONFIG, TENSORS}
