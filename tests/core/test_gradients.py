"""Squared gradients block by block are those of the whole model in memory, for dense models and mixtures."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import dashq.stream
from dashq.gradients import row_effects
from dashq.model import Model, block_matrices
from dashq.pipeline import open_model
from pico import pico_model
from recipes import build_recipe

TOKENS = torch.arange(3 * 20).reshape(3, 20) * 7 % 300


def walked(family: str, folder: Path) -> tuple[Model, dict[str, Tensor]]:
    model = open_model(build_recipe(pico_model(family, folder / "model"), folder / "out", dtype="float32"))
    return model, dict(row_effects(model, [layer.name for layer in model.layers()], TOKENS, seed=3))


def at_once(folder: Path, blocks: tuple[str, ...], batches: int) -> dict[str, Tensor]:
    """The same from the definition: draw labels, differentiate by the weights, square, and add rows up."""
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {}
    for batch in TOKENS.chunk(batches):
        network.zero_grad()
        for sample in batch.split(1):
            logits = network(sample).logits[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for block in blocks:
            module = network.get_submodule(block)
            for name, matrix in block_matrices(module).items():
                gradient = module.get_parameter(matrix.parameter).grad
                assert gradient is not None
                rows = matrix.of(gradient).square().sum(1) / TOKENS.numel()
                found[f"{block}.{name}"] = found.get(f"{block}.{name}", 0) + rows
    return found


# Tied and untied heads, transposed weights, blocks that return a tuple, experts in stacks.
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gpt2", "bloom", "gemma3", "mixtral", "gpt_oss"])
def test_they_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model, found = walked(family, tmp_path)
    expected = at_once(tmp_path, model.blocks, batches=1)
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_each_batch_counts_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashq.stream, "TOKENS_PER_BATCH", 20)
    model, found = walked("llama", tmp_path)
    for name, rows in at_once(tmp_path, model.blocks, batches=3).items():
        torch.testing.assert_close(found[name], rows, rtol=1e-3, atol=1e-6, msg=name)


def test_only_so_many_tokens_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = walked("llama", tmp_path)
    monkeypatch.setattr("dashq.gradients.GRADIENT_TOKENS", 45)
    few = row_effects(model, list(found), TOKENS, seed=3)
    first = row_effects(model, list(found), TOKENS[:2], seed=3)
    assert all(few[name].equal(first[name]) for name in found)
    assert not any(few[name].equal(found[name]) for name in found)


def test_the_blocks_are_heard_of_forward_and_back(tmp_path: Path) -> None:
    heard: list[int] = []
    model, _ = walked("llama", tmp_path)
    row_effects(model, ["model.layers.1.mlp.down_proj"], TOKENS, 0, heard.append)
    assert heard == [1, 2, 3, 4, 5, 6]
