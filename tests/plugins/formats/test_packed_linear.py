"""Checkpoints in the layout of the authors of DASH-Q are packed as they pack them, and opened as they lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dashq import CheckpointError
from dashq.results.checkpoint import open_checkpoint, open_network
from format_results import FormatResults

IDS = torch.arange(9)[None]


def test_an_independent_reader_of_the_authors_layout_finds_the_same_weights(results: FormatResults) -> None:
    folder = results["dashq-packed-linear"]
    tensors = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    for name, entry in json.loads((folder / "dashq_config.json").read_text()).items():
        per_word = 32 // entry["nbits"]
        codes = []
        for word in tensors[f"{name}.W_q_packed"].tolist():
            word &= 0xFFFFFFFF
            codes += [word >> entry["nbits"] * place & (1 << entry["nbits"]) - 1 for place in range(per_word)]
        groups = torch.tensor(codes[: entry["num_groups"] * entry["group_size"]]).view(-1, entry["group_size"])
        zero, scale = (tensors[f"{name}.{key}"].float() for key in ("zero", "scale"))
        weight = ((groups - zero) * scale).view(-1, entry["quant_in_features"])[:, : entry["in_features"]]
        assert weight.equal(checkpoint.quantized(name).dequantize())


def test_a_checkpoint_in_the_authors_layout_opens_without_our_own_files(results: FormatResults, tmp_path: Path) -> None:
    ours = results["dashq-packed-linear"]
    theirs = shutil.copytree(ours, tmp_path / "theirs", ignore=shutil.ignore_patterns("report.json", "recipe.yaml"))
    with torch.inference_mode():
        expected, logits = (open_network(folder, torch.float32)(IDS).logits for folder in (ours, theirs))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nbits": 5}, r"5 bits, where \(2, 3, 4\) can be read"),
        ({"num_groups": 7}, "7 groups of 64 do not fill rows"),
        ({"quant_in_features": 512}, "do not fill rows"),
        ({"scale_zero_dtype": "bfloat16"}, "where float16 can be read"),
        ({"group_size": None}, "does not describe packed layers"),
    ],
)
def test_a_checkpoint_of_the_authors_that_is_otherwise_is_refused(
    change: dict[str, Any], reason: str, results: FormatResults, tmp_path: Path
) -> None:
    own = shutil.ignore_patterns("report.json", "recipe.yaml")
    folder = shutil.copytree(results["dashq-packed-linear"], tmp_path / "x", ignore=own)
    content = json.loads((folder / "dashq_config.json").read_text())
    content["model.layers.0.mlp.up_proj"] |= change
    (folder / "dashq_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)
