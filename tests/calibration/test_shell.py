"""The model without its blocks embeds, calls the blocks, and predicts as the whole model does."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dashq.calibration.shell import shell_of
from dashq.model.decoder import Block, Model
from dashq.quantizing.opening import open_model
from family_results import FamilyResults
from pico import pico_model
from recipes import build_recipe
from tensors import noise

TOKENS = torch.arange(2 * 20).reshape(2, 20) * 7 % 300


def through_blocks(model: Model, hidden: Any, calls: Any) -> Any:
    """Hidden states behind all blocks, each called as the shell says."""
    for block in model.walk():
        call = calls[block.index]
        output = block.module(hidden, *call.args, **call.kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


# Tied and untied heads, positions that are learned, blocks that return a tuple, states that are scaled.
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gpt2", "bloom", "gemma3", "mixtral"])
def test_embedding_calls_and_prediction_are_the_whole_models(
    family: str, families: FamilyResults, tmp_path: Path
) -> None:
    folder = families.model(family)
    model = open_model(build_recipe(folder, tmp_path / "out", dtype="float32"))
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(), shell_of(model, head=True) as shell:
        hidden, calls = shell.embed(TOKENS)
        assert len(calls) == len(model.blocks)
        predicted = shell.predict(TOKENS, through_blocks(model, hidden, calls))
        torch.testing.assert_close(predicted, network(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert shell.embed(TOKENS)[0].equal(hidden)  # predictions leave nothing behind


def test_a_mixture_that_gives_its_routers_logits_predicts_as_well(tmp_path: Path) -> None:
    folder = pico_model("mixtral", tmp_path / "model", output_router_logits=True)
    model = open_model(build_recipe(folder, tmp_path / "out", dtype="float32"))
    with torch.no_grad(), shell_of(model, head=True) as shell:
        assert shell.predict(TOKENS, shell.embed(TOKENS)[0]).shape == (2, 20, 320)


def test_replaced_gains_count_for_one_prediction_and_have_gradients(model: Path, tmp_path: Path) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out", dtype="float32"))
    hidden, gain = noise(0, 2, 20, 48), noise(1, 48).requires_grad_()
    with shell_of(opened, head=True) as shell:
        before = shell.predict(TOKENS, hidden)
        replaced = shell.predict(TOKENS, hidden, {"model.norm.weight": gain})
        (gradient,) = torch.autograd.grad(replaced.square().sum(), gain)
        assert gradient.any()
        assert not replaced.equal(before)
        assert shell.predict(TOKENS, hidden).equal(before)


def test_the_first_block_is_read_once_and_all_is_given_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out", dtype="float32"))
    read: list[int] = []
    block = Model.block

    def noted(self: Model, index: int) -> AbstractContextManager[Block]:
        read.append(index)
        return block(self, index)

    monkeypatch.setattr(Model, "block", noted)
    with torch.no_grad(), shell_of(opened, head=True) as shell:
        for _ in range(2):
            hidden, _ = shell.embed(TOKENS)
            shell.predict(TOKENS, hidden)
    assert read == [0]
    assert all(parameter.is_meta for parameter in opened.network.parameters())
