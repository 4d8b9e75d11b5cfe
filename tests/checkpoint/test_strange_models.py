"""Model folders from strangers: what config.json claims is one ValueError with the folder, before it takes memory."""

from __future__ import annotations

import json

import pytest
from models import build

import zerolite


@pytest.mark.parametrize(
    "entries",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModel"]},
        {"architectures": [3]},
        {"hidden_size": -16},
        {"hidden_size": 2**20, "intermediate_size": 2**20, "vocab_size": 2**20},
        {"num_hidden_layers": 10**7},
        {"dtype": "__import__('os')"},
        {"model_type": "no such"},
        {"intermediate_size": 24},
    ],
    ids=str,
)
def test_a_configuration_that_no_model_fits_names_the_folder(tmp_path, entries):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        zerolite.load_pretrained(tmp_path, stage=2)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\x00", b"{"], ids=["deep", "bytes", "cut"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_names_the_folder(tmp_path, name, content):
    build("llama").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        zerolite.load_pretrained(tmp_path, stage=2)
