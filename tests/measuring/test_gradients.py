"""Expected losses, block by block, are those of the whole model in memory, for dense models and mixtures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dashq.measuring import gradients
from dashq.measuring.gradients import Errors, expected_losses
from dashq.model.decoder import Model, block_matrices
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import build_recipe

TOKENS = torch.arange(3 * 20).reshape(3, 20) * 7 % 300


def opened(family: str, folder: Path, **sizes: Any) -> tuple[Model, dict[str, Errors]]:
    """A model, and two kinds of errors in every second row of each of its layers."""
    model = open_model(build_recipe(pico_model(family, folder / "model", **sizes), folder / "out", dtype="float32"))
    generator = torch.Generator().manual_seed(1)
    errors = {}
    for layer in model.all_layers():
        rows = torch.arange(0, layer.rows, 2)
        values = torch.randn(2, len(rows), layer.columns, generator=generator)
        errors[layer.name] = Errors(layer, rows, torch.ones(len(rows)), values)
    return model, errors


def inside(errors: dict[str, Errors]) -> dict[str, Errors]:
    """The errors of layers in blocks alone."""
    return {name: error for name, error in errors.items() if error.layer.role == "linear"}


def at_once(folder: Path, blocks: tuple[str, ...], errors: dict[str, Errors]) -> dict[str, Tensor]:
    """The same from the definition: draw labels, differentiate by the weights, multiply, square, add up."""
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses = {name: torch.zeros(2, dtype=torch.float64) for name in errors}
    for number, sample in enumerate(TOKENS.split(1)):
        generator = torch.Generator().manual_seed(3 + number)
        network.zero_grad()
        logits = network(sample).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
        gradients = {name: network.get_parameter(f"{name}.weight").grad for name in errors.keys() - inside(errors)}
        for block in blocks:
            module = network.get_submodule(block)
            for name, matrix in block_matrices(module).items():
                gradient = module.get_parameter(matrix.parameter).grad
                assert gradient is not None
                gradients[f"{block}.{name}"] = matrix.of(gradient)
        for name, error in errors.items():
            by_weight = gradients[name]
            assert by_weight is not None
            products = (error.values * by_weight[error.rows]).sum(-1)
            losses[name] += products.square().sum(1) / (2 * TOKENS.numel())
    return losses


# Tied and untied heads, transposed weights, blocks that return a tuple, experts in stacks.
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gpt2", "bloom", "gemma3", "mixtral", "gpt_oss"])
def test_they_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model, errors = opened(family, tmp_path)
    if any(error.layer.role == "tied" for error in errors.values()):  # has two gradients, see below
        errors = inside(errors)
    losses = expected_losses(model, errors, TOKENS, seed=3)
    expected = at_once(tmp_path, model.blocks, errors)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_tied_matrix_costs_what_it_costs_as_embeddings_and_as_head(tmp_path: Path) -> None:
    model, errors = opened("llama", tmp_path / "tied")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "tied" / "model")
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    network.config.tie_word_embeddings = False
    network._tied_weights_keys, network.all_tied_weights_keys = {}, {}
    network.save_pretrained(tmp_path / "untied" / "model")
    opened_untied = open_model(
        build_recipe(tmp_path / "untied" / "model", tmp_path / "untied" / "out", dtype="float32")
    )
    (tied,) = errors.keys() - inside(errors)
    own = {
        layer.name: replace(errors[tied], layer=layer) for layer in opened_untied.all_layers() if layer.role != "linear"
    }
    apart = expected_losses(opened_untied, own, TOKENS, seed=3)
    together = expected_losses(model, {tied: errors[tied]}, TOKENS, seed=3)[tied]
    torch.testing.assert_close(together, sum(apart.values(), torch.zeros(2)).double(), rtol=1e-3, atol=1e-6)


def test_a_row_counts_for_as_many_as_it_stands_for(tmp_path: Path) -> None:
    model, errors = opened("llama-untied-biased", tmp_path)
    once = expected_losses(model, errors, TOKENS, seed=3)
    heavier = {name: replace(error, row_weights=3 * error.row_weights) for name, error in errors.items()}
    for name, loss in expected_losses(model, heavier, TOKENS, seed=3).items():
        torch.testing.assert_close(loss, 3 * once[name])


def test_only_so_many_samples_and_tokens_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, errors = opened("llama", tmp_path)
    first = expected_losses(model, errors, TOKENS[:2, :15], seed=3)
    whole = expected_losses(model, errors, TOKENS, seed=3)
    monkeypatch.setattr(gradients, "SAMPLES", 2)
    monkeypatch.setattr(gradients, "TOKENS", 15)
    few = expected_losses(model, errors, TOKENS, seed=3)
    assert all(few[name].equal(first[name]) for name in errors)
    assert not any(few[name].equal(whole[name]) for name in errors)


def test_only_the_layers_that_are_asked_for_are_weighed(tmp_path: Path) -> None:
    heard: list[int] = []
    model, errors = opened("llama", tmp_path)
    errors_of_one = {name: errors[name] for name in ["model.layers.1.mlp.down_proj"]}
    losses = expected_losses(model, errors_of_one, TOKENS, 3, heard.append)
    assert losses.keys() == errors_of_one.keys()
    assert heard == [1, 2, 3, 4, 5, 6]  # forward and back
