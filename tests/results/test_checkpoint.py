"""Finished results open as checkpoints and as networks, whatever their format, and anything else is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from commands import call
from dashq import CheckpointError
from dashq.results.checkpoint import open_checkpoint, open_network
from format_results import SCHEMES, FormatResults

IDS = torch.arange(9)[None]


def logits(network: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = network(IDS).logits
    return result


@pytest.mark.parametrize("label", SCHEMES)
def test_dashq_opens_its_results_in_every_format(label: str, wide_model: Path, results: FormatResults) -> None:
    checkpoint = open_checkpoint(results[label])
    plain = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.float32)
    for name in checkpoint.layers:
        plain.get_submodule(name).weight.data = checkpoint.quantized(name).dequantize()
    assert torch.allclose(logits(open_network(results[label], torch.float32)), logits(plain), atol=1e-4)


def test_foreign_unfinished_and_unknown_results_are_told(results: FormatResults, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no finished result of dashq: it has no report\.json"):
        open_checkpoint(tmp_path)
    folder = shutil.copytree(results["mlx"], tmp_path / "unknown")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"serializer": {"name": "papyrus"}}))
    with pytest.raises(CheckpointError, match="packed by the serializer 'papyrus', which is not installed"):
        open_checkpoint(folder)
    (tmp_path / "dashq_config.json").write_text('{"layer": {"nbits": 5}}')
    with pytest.raises(CheckpointError, match="does not describe packed layers"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("name", "reason"), [("report.json", "is no finished"), ("recipe.yaml", "is not as dashq")])
def test_a_result_without_its_own_files_is_unfinished(
    name: str, reason: str, results: FormatResults, tmp_path: Path
) -> None:
    folder = shutil.copytree(results["mlx"], tmp_path / "x", ignore=shutil.ignore_patterns(name))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_one_file_of_weights_that_does_not_fit_the_configuration_is_refused_in_one_line(
    results: FormatResults, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results["Q4_1"], tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 330}))
    with pytest.raises(CheckpointError) as refusal:
        open_network(folder, torch.float32)
    assert str(refusal.value).startswith(f"{folder} cannot be opened: RuntimeError: Error(s) in loading state_dict")
    assert "\n" not in str(refusal.value)


def test_a_result_of_an_unknown_version_is_refused(results: FormatResults, tmp_path: Path) -> None:
    folder = shutil.copytree(results["dashq"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call("verify", folder)
    assert outcome.code == 2
    assert "format version 99; this dashq reads version 1" in outcome.errors
