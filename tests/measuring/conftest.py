from pathlib import Path

import pytest

from choices import GROUPERS
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for
from dashq.measuring.sensitivity import analyze
from dashq.quantizing.opening import open_model
from recipes import build_recipe


@pytest.fixture(scope="package")
def analysis(model: Path) -> Analysis:
    """The measured pico Llama: 2, 3 and 4 bits in groups of 8 and 16."""
    recipe = build_recipe(model, model.with_name("measured"), budget={"bits_per_weight": 5, "groupers": GROUPERS})
    opened = open_model(recipe)
    return analyze(recipe, opened, choices_for(recipe, opened))
