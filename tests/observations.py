"""Observations for tests: a model's blocks are watched in turn."""

import torch
from torch import Tensor

from dashq import Recipe, make_plan
from dashq.calibration.layers import Observation
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw
from dashq.quantizing.opening import open_model


def observe(recipe: Recipe) -> tuple[Tensor, dict[str, Observation]]:
    """The calibration tokens, and the observations of every layer of the model by name."""
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = draw(recipe.calibration, model.tokenizer).samples
    observations: dict[str, Observation] = {}
    with torch.no_grad():
        stream = Stream(model, tokens)
        for block in model.walk():
            own_plans = [plan for plan in plans if plan.layer.block == block.name]
            observations |= observe_block(block, own_plans, stream, one_pass=True)
    return tokens, observations
