"""The head's curvature is that of its inputs; the embeddings' is flat, and rows count as often as tokens occur."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

from dashq.calibration.layers import Observation
from dashq.calibration.outside import observe_outside
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.quantizing.opening import open_model, plan_model
from pico import pico_model
from recipes import build_recipe, small_scheme

TOKENS = torch.arange(3 * 20).reshape(3, 20) * 7 % 300
ENTRIES: dict[str, Any] = {"embeddings": {"bits": 4}, "head": {"bits": 4}}


def observed(family: str, folder: Path, estimator: str = "full") -> tuple[dict[str, Observation], Path]:
    """What a walk over an unquantized model observes of what lies outside the blocks."""
    path = pico_model(family, folder / "model")
    scheme = small_scheme(estimator=estimator, solver="rtn")
    recipe = build_recipe(path, folder / "out", dtype="float32", scheme=scheme, **ENTRIES)
    model = open_model(recipe)
    plans = [plan for plan in plan_model(recipe, model) if plan.layer.role != "linear"]
    with torch.no_grad():
        stream = Stream(model, TOKENS, samples_per_batch=2)
        for block in model.walk():
            stream.advance(block)
        with model.outside(head=True):
            return observe_outside(model, Shell(model), plans, TOKENS, stream), path


def inputs_of_the_head(path: Path) -> Float[Tensor, "tokens width"]:
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        hidden: Tensor = network.base_model(TOKENS).last_hidden_state
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("family", ["llama-untied-biased", "mistral"])
def test_the_head_sees_the_last_hidden_states_behind_the_last_norm(family: str, tmp_path: Path) -> None:
    observations, path = observed(family, tmp_path)
    x = inputs_of_the_head(path)
    head = observations["lm_head"]
    torch.testing.assert_close(head.curvature.dense(), x.T @ x / len(x), rtol=1e-3, atol=1e-3)
    assert (head.tokens, head.row_weights) == (60, None)


@pytest.mark.parametrize("estimator", ["full", "diagonal", "block_diagonal", "hybrid"])
def test_embeddings_are_flat_and_rows_count_as_often_as_their_tokens_occur(estimator: str, tmp_path: Path) -> None:
    observations, _ = observed("llama-untied-biased", tmp_path, estimator)
    embeddings = observations["model.embed_tokens"]
    torch.testing.assert_close(embeddings.curvature.dense(), torch.eye(48), rtol=1e-4, atol=1e-4)
    assert embeddings.row_weights is not None
    assert embeddings.tokens == 60
    occurrences = [TOKENS.flatten().tolist().count(token) for token in range(320)]
    assert embeddings.row_weights.tolist() == [max(1, count) for count in occurrences]


def test_one_matrix_for_both_is_mostly_the_head(tmp_path: Path) -> None:
    observations, path = observed("llama", tmp_path)
    (tied,) = observations.values()
    x = inputs_of_the_head(path)
    of_the_head = x.T @ x / len(x)
    expected = 0.9 * of_the_head + 0.1 * of_the_head.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(tied.curvature.dense(), expected, rtol=1e-3, atol=1e-3)
    assert tied.row_weights is not None
