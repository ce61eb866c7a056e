"""Observations for tests: a model's blocks are watched in turn."""

from typing import Any

import torch
from torch import Tensor

from dashq import make_plan
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import calibration_tokens
from dashq.pipeline import open_model


def observe(recipe: Any, samples: int = 3) -> tuple[Tensor, dict[str, Any]]:
    """The calibration tokens, and what every layer of the walk sees of them."""
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = calibration_tokens(recipe.calibration.dataset, model.tokenizer(), samples, tokens=40, seed=0)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        with model.outside():
            stream = Stream(model, tokens)
        for index, name in enumerate(model.blocks):
            with model.block(index) as block:
                mine = [plan for plan in plans if plan.layer.name.startswith(f"{name}.")]
                seen |= observe_block(block, mine, stream, index, one_pass=True)
    return tokens, seen
