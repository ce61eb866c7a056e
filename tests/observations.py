"""Observations for tests: a model's blocks are watched in turn."""

import torch
from torch import Tensor

from dashq import Recipe, make_plan
from dashq.calibration.layers import Observation
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import calibration_tokens
from dashq.pipeline import open_model


def observe(recipe: Recipe, samples: int = 3) -> tuple[Tensor, dict[str, Observation]]:
    """The calibration tokens, and the observations of every layer of the model by name."""
    model = open_model(recipe)
    plans = make_plan(recipe, model.layers())
    tokens = calibration_tokens(recipe.calibration.dataset, model.tokenizer(), samples, tokens=40, seed=0)
    observations: dict[str, Observation] = {}
    with torch.no_grad():
        with model.outside():
            stream = Stream(model, tokens)
        for index, name in enumerate(model.blocks):
            with model.block(index) as block:
                own_plans = [plan for plan in plans if plan.layer.name.startswith(f"{name}.")]
                observations |= observe_block(block, own_plans, stream, index, one_pass=True)
    return tokens, observations
