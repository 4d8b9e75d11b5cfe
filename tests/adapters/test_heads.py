"""New heads of classifiers train whole with the adapter and are saved with it, as PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from lora_models import base as language_model
from models import assert_close, assert_same_bits, drawn, part
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zerolite
from zerolite.adapters.checks import check_gradients
from zerolite.adapters.files import CONFIG, TENSORS, load, save
from zerolite.adapters.heads import TASK
from zerolite.adapters.lora import add_lora
from zerolite.adapters.merge import merge
from zerolite.adapters.presets import parameter_groups
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapter_of, disabled, use
from zerolite.engine.engine import info_of

peft = pytest.importorskip("peft", reason="adapters are exchanged with PEFT: pip install peft")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "num_labels": 3, "max_position_embeddings": 64,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_labels": 3, "pad_token_id": 0,
    "eos_token_id": 14, "max_position_embeddings": 64,
}  # fmt: skip
DISTILBERT = {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "num_labels": 3}
Q_K_V = ["q_proj", "k_proj", "v_proj"]
# Class of transformers -> (its sizes, PEFT's task_type, targets, the outermost modules of the new head).
MODELS = {
    "LlamaForSequenceClassification": (SIZES, "SEQ_CLS", Q_K_V, ["score"]),
    "LlamaForTokenClassification": (SIZES, "TOKEN_CLS", Q_K_V, ["score"]),
    "LlamaForQuestionAnswering": (SIZES, "QUESTION_ANS", Q_K_V, ["qa_outputs"]),
    "RobertaForSequenceClassification": (SIZES, "SEQ_CLS", ["query", "key", "value"], ["classifier"]),
    "DistilBertForSequenceClassification": (
        DISTILBERT, "SEQ_CLS", ["q_lin", "v_lin"], ["pre_classifier", "classifier"],
    ),
    "BartForSequenceClassification": (BART, "SEQ_CLS", ["q_proj", "v_proj"], ["classification_head"]),
}  # fmt: skip


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    cls = getattr(transformers, name)
    return drawn(lambda: cls(cls.config_class(**MODELS[name][0]))).to(dtype).eval()


def outputs(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 15).view(2, 6).clone()
    ids[:, -1] = 14  # the end, where BART reads
    output = model(input_ids=ids)
    return torch.stack([output.start_logits, output.end_logits]) if "start_logits" in output else output.logits


@torch.no_grad()
def draw(model: nn.Module) -> nn.Module:
    """Everything that trains, away from zero and from where it started."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def theirs(name: str, **options) -> nn.Module:
    _, task, targets, head = MODELS[name]
    more = {"modules_to_save": head} if head == ["classification_head"] else {}  # which PEFT does not know
    config = peft.LoraConfig(task_type=task, r=4, target_modules=targets, **{**more, **options})
    return peft.get_peft_model(base(name), config).eval()


def ours(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return add_lora(base(name, dtype), r=4, dropout=0.0, targets=MODELS[name][2], **options)


# In both directions #


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_exchanged_with_peft_bit_by_bit(name, tmp_path):
    """As many values train; PEFT's folder opens here and ours there, to the same logits; merging keeps them."""
    assert trained(ours(name)) == trained(theirs(name))
    twin = draw(theirs(name))
    twin.save_pretrained(tmp_path / "theirs")
    opened = load(base(name), tmp_path / "theirs")
    assert torch.equal(outputs(opened), outputs(twin)) and not torch.allclose(outputs(opened), outputs(base(name)))
    assert trained(opened) == trained(twin)
    save(opened, tmp_path / "again")
    assert_same_bits(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))
    model = draw(ours(name))
    save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        there = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
    expected = outputs(model)
    assert torch.equal(outputs(there), expected)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["task_type"] == MODELS[name][1]
    assert merge(model, batch={"input_ids": torch.tensor([[3, 4, 14]])}) < 1e-5
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_modules_of_layers_are_exchanged_too(tmp_path):
    """In PEFT a name means every module whose name ends so: "norm" those of all layers and the last."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=Q_K_V, modules_to_save=["norm"])
    twin = draw(peft.get_peft_model(language_model("llama"), config, autocast_adapter_dtype=False)).eval()
    twin.save_pretrained(tmp_path / "theirs")
    model = load(language_model("llama"), tmp_path / "theirs")
    assert torch.equal(outputs(model), outputs(twin)) and trained(model) == trained(twin)
    assert len(adapter_of(model, None).copies) == 5
    again = draw(add_lora(language_model("llama"), r=4, dropout=0.0, modules_to_save=["norm"]))
    save(again, tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(language_model("llama"), tmp_path / "ours", autocast_adapter_dtype=False)
    assert torch.equal(outputs(there.eval()), outputs(again))


def checkpoint_on_rank(folder: Path):
    def build(stage: int):
        model = add_lora(language_model("llama", torch.float32), r=2, dropout=0.0, modules_to_save=["norm"])
        model = zerolite.shard(draw(model), stage)
        return model, zerolite.AdamW(parameter_groups(model, lr=1e-2))

    def step(model, optimizer) -> None:
        model(input_ids=torch.arange(3, 15).view(2, 6)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build(3)
    step(model, optimizer)
    zerolite.save(model, folder, optimizer, frozen=False)
    step(model, optimizer)
    again, other = build(2)
    zerolite.load(again, folder, other)
    step(again, other)
    with torch.no_grad():
        return outputs(model), outputs(again)


def test_copies_in_layers_resume_from_a_checkpoint(ranks, tmp_path):
    """Saved at stage 3 and gone on with at stage 2: the same bits."""
    for straight, resumed in ranks(2).run(checkpoint_on_rank, tmp_path / "c"):
        assert torch.equal(straight, resumed)


def test_what_is_copied_is_what_peft_copies():
    """Of every classifier of PEFT's three tasks the head is at least what PEFT trains, and lies outside of the base."""
    names = [name for name in dir(transformers) if TASK.search(name) and name.startswith(("Bert", "Electra", "XLNet"))]
    assert len(names) > 8
    for name in names:
        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(cls.config_class(num_hidden_layers=1, n_layer=1))
        known = {
            child
            for child, _ in model.named_children()
            if child.endswith(("classifier", "score", "qa_outputs", "logits_proj", "sequence_summary"))
        }
        outside = {child for child, module in model.named_children() if any(True for _ in module.parameters())}
        add_lora(model, targets="all-linear")
        assert set(adapter_of(model, None).copies) == outside - {model.base_model_prefix} >= known & outside


# One model, several adapters #


def test_each_adapter_has_a_head_of_its_own():
    """`use` brings each one's logits back, `disabled` the base's; a copied model has heads of its own."""
    name = "RobertaForSequenceClassification"
    model = draw(ours(name))
    first = outputs(model)
    draw(add_lora(model, r=2, targets=["query"], name="second"))
    second = outputs(model)
    assert not torch.allclose(first, second)
    with disabled(model):
        assert torch.equal(outputs(model), outputs(base(name)))
    use(model, "default")
    assert torch.equal(outputs(model), first)
    twin = copy.deepcopy(model)
    use(model, "second")
    with torch.no_grad():
        for parameter in adapter_of(twin, "second").parameters.values():
            parameter.zero_()
    assert torch.equal(outputs(model), second) and torch.equal(outputs(twin), first)
    frozen = {key: p for key, p in model.named_parameters() if key in dict(base(name).named_parameters())}
    assert_same_bits(frozen, dict(base(name).named_parameters()))


def test_other_code_reads_the_weight_that_forwards_use():
    model = draw(ours("LlamaForSequenceClassification"))
    assert model.score.weight is adapter_of(model, None).copies["score"].weight and model.score.weight.requires_grad
    with disabled(model):
        assert torch.equal(model.score.weight, base("LlamaForSequenceClassification").score.weight)
    assert "score.weight" in model.state_dict()


def test_lora_stays_out_of_what_trains_whole(tmp_path):
    """As in PEFT; a target that lies nowhere else is an error."""
    model = add_lora(base("RobertaForSequenceClassification"), targets="all-linear")
    assert not any(key.startswith("classifier") for key in adapter_of(model, None).parameters)
    with pytest.raises(ValueError, match=r"out_proj match no module \(classifier trains whole: see modules_to_save\)"):
        add_lora(base("RobertaForSequenceClassification"), targets=["query", "out_proj"])
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "dense"])
    twin = draw(peft.get_peft_model(base("RobertaForSequenceClassification"), config)).eval()
    twin.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(base("RobertaForSequenceClassification"), tmp_path)), outputs(twin))
    model = add_lora(base("RobertaForSequenceClassification"), targets=["query", "out_proj"], modules_to_save=())
    assert "classifier.out_proj.lora.default.lora_A" in adapter_of(model, None).parameters
    assert not adapter_of(model, None).copies


def test_a_frozen_head_can_be_meant_and_peft_opens_it(tmp_path):
    model = ours("LlamaForSequenceClassification", modules_to_save=())
    assert not model.score.weight.requires_grad
    save(draw(model), tmp_path)
    assert torch.equal(
        outputs(peft.PeftModel.from_pretrained(base("LlamaForSequenceClassification"), tmp_path).eval()), outputs(model)
    )


# On ranks #


def labels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(3, 64, (4, 6), generator=generator)
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1, 1])}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """In fp64: transformers' own may be fp32."""
    logits = model(input_ids=batch["input_ids"]).logits.double()
    return nn.functional.cross_entropy(logits, batch["labels"])


NAME = "LlamaForSequenceClassification"


def train_on_rank(stage: int, offload: str | None, folder: Path):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = draw(ours(NAME, torch.float64 if offload is None else torch.float32))
    start = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    zerolite.shard(model, stage, offload=offload)
    parameters = info_of(model.score.weight).bucket.parameters
    assert parameters.stays_unsharded == (stage < 3), "it is sharded as the base's are"
    optimizer = zerolite.AdamW(parameter_groups(model, lr=1e-2), max_grad_norm=1.0)
    for step in range(3):
        loss_of(model, part(labels(), rank, world)).backward()
        if step == 0:
            check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    save(model, folder / "adapter")
    with torch.no_grad():
        logits = outputs(model)
        with disabled(model):
            plain = outputs(model)
            zerolite.export(model, folder / "base")
    values = load_file(folder / "adapter" / TENSORS)
    if rank == 0:
        save_file({key: torch.zeros_like(value) for key, value in values.items()}, folder / "zeros", {"format": "pt"})
        (folder / "spoilt").mkdir()
        (folder / "spoilt" / CONFIG).write_text((folder / "adapter" / CONFIG).read_text())
        (folder / "zeros").rename(folder / "spoilt" / TENSORS)
    dist.barrier()
    with torch.no_grad():
        load(model, folder / "spoilt")
        spoilt = outputs(model)
        load(model, folder / "adapter")
        again = outputs(model)
        merge(model, batch={"input_ids": torch.tensor([[3, 4, 14]])})
        merged = outputs(model)
    with zerolite.full_params(model):
        now = dict(model.named_parameters())
        moved = [key for key, value in start.items() if not torch.equal(now[key], value)]
    return values, logits, plain, spoilt, again, merged, moved


@pytest.mark.parametrize(("stage", "offload"), [(0, None), (2, None), (3, None), (3, "cpu")])
def test_a_head_trains_on_ranks_as_in_peft(ranks, stage, offload, tmp_path):
    """Three steps on two ranks end at PEFT's values on one process; saved, loaded, merged and exported there."""
    answers = ranks(2).run(train_on_rank, stage, offload, tmp_path)
    dtype = torch.float64 if offload is None else torch.float32
    twin = peft.get_peft_model(
        base(NAME, dtype),
        peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=Q_K_V),
        autocast_adapter_dtype=False,
    )
    save(draw(ours(NAME, dtype)), tmp_path / "start")
    twin.load_adapter(str(tmp_path / "start"), "default", is_trainable=True)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        loss_of(twin, labels()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    twin.save_pretrained(tmp_path / "theirs")
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if offload is None else {"rtol": 1e-2, "atol": 1e-4}
    for values, logits, plain, spoilt, again, merged, moved in answers:
        assert_close(values, load_file(tmp_path / "theirs" / TENSORS), **tolerance)
        assert torch.equal(plain, outputs(base(NAME, dtype)))
        assert torch.equal(again, logits) and not torch.allclose(spoilt, logits)
        assert all(key.endswith(("_proj.weight", "score.weight")) for key in moved) and len(moved) == 7  # merged
        torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-5)
    exported = load_file(tmp_path / "base" / "model.safetensors")
    assert_same_bits(exported, base(NAME, dtype).state_dict())


def load_on_rank(folder: str, stage: int):
    torch.manual_seed(dist.get_rank())
    model = zerolite.load_pretrained(folder, stage, adapt=lambda model: add_lora(model, r=4))
    loss_of(model, labels()).backward()
    check_gradients(model)
    with torch.no_grad():
        return outputs(model), [key for key, p in model.named_parameters() if p.requires_grad and "score" in key]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_head_added_before_its_values_starts_from_the_folders(ranks, stage, tmp_path):
    base(NAME).save_pretrained(tmp_path)
    for logits, names in ranks(2).run(load_on_rank, str(tmp_path), stage):
        assert torch.equal(logits, outputs(base(NAME))) and names == ["trained_copies.default.score.weight"]


def test_a_copy_that_never_got_its_values_computes_nothing():
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES))
    add_lora(model)
    model.load_state_dict(base(NAME).state_dict(), assign=True, strict=False)
    with pytest.raises(ValueError, match="starts from the values of score, which had none"):
        model.score(torch.zeros(1, 16))
    with disabled(model):
        assert model.score(torch.zeros(1, 16)).abs().max() == 0


# Refusals #


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.head.weight
        self.counted = nn.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("build", "names", "text"),
    [
        (Tied, ["head"], "tied to another"),
        (Tied, ["counted"], "buffers"),
        (Tied, ["nowhere"], "'nowhere', where no name of a module ends; the outermost are q_proj, head"),
        (Tied, "head", "list of names"),
        (lambda: language_model("llama"), ["lm_head"], r"\['lm_head'\] is not supported.*embeddings"),
        (lambda: language_model("llama"), ["embed_tokens"], "embeddings"),
        (lambda: base("RobertaForSequenceClassification"), ["classifier", "out_proj"], "lies in another"),
    ],
)
def test_modules_that_cannot_train_whole_are_refused_by_name(build, names, text):
    model = build()
    with pytest.raises(ValueError, match=text):
        add_lora(model, modules_to_save=names, targets="all-linear")
    assert not hasattr(model, "_zerolite_adapters") and all(p.requires_grad for p in model.parameters())


def test_what_may_be_new_outside_of_another_base_is_told():
    """Not for a language model, whose output layer is pretrained, nor where the user has said."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    build = lambda: transformers.BertForNextSentencePrediction(transformers.BertConfig(**sizes))  # noqa: E731
    with pytest.warns(UserWarning, match=r"cls of BertForNextSentencePrediction .* modules_to_save=\['cls'\]"):
        add_lora(build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(build(), modules_to_save=())
        add_lora(build(), modules_to_save=["cls"])
        add_lora(language_model("llama"))


def test_virtual_tokens_do_not_leave_a_new_head_frozen():
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification has a new head \(score\)"):
        add_prompt(base(NAME))
