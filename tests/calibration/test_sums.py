"""All that calibration learned of a part of the model stands in its sums: who takes them observes the same."""

from pathlib import Path

import pytest
import torch

from dashq.calibration.observe import BlockWatcher, watch_block
from dashq.calibration.stream import Stream
from dashq.calibration.sums import PartSums
from dashq.calibration.tokens import draw_for
from dashq.processes.trees import outline
from dashq.quantizing.opening import open_model, plan_model
from family_results import FamilyResults
from recipes import build_recipe, mixture_scheme


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_a_watcher_that_takes_sums_observes_what_the_one_that_formed_them_does(
    families: FamilyResults, tmp_path: Path, family: str
) -> None:
    scheme = mixture_scheme(estimator="full", pooling_tokens=16)
    recipe = build_recipe(families.model(family), tmp_path / "out", scheme=scheme)
    model = open_model(recipe)
    plans = [plan for plan in plan_model(recipe, model) if plan.layer.block == model.blocks[0]]
    stream = Stream(model, draw_for(model, recipe.calibration).samples)
    with model.block(0) as block:
        watched = watch_block(block, plans, stream, one_pass=True)
        taking = BlockWatcher(block, plans, shares=1, is_spread=False)
        taking.take(watched.sums())
        seen, taken = watched.observations(), taking.observations()
    assert outline(taking.sums()) == outline(watched.sums())
    assert seen.keys() == taken.keys() == {plan.layer.name for plan in plans}
    for name, observation in seen.items():
        assert taken[name].curvature.dense().equal(observation.curvature.dense())
        assert (taken[name].tokens, taken[name].shrinkage) == (observation.tokens, observation.shrinkage)
        assert taken[name].effective_tokens == observation.effective_tokens


def test_layers_that_share_their_inputs_share_a_fold(families: FamilyResults, tmp_path: Path) -> None:
    recipe = build_recipe(families.model("llama"), tmp_path / "out")
    model = open_model(recipe)
    plans = [plan for plan in plan_model(recipe, model) if plan.layer.block == model.blocks[0]]
    stream = Stream(model, draw_for(model, recipe.calibration).samples)
    with torch.no_grad(), model.block(0) as block:
        sums = watch_block(block, plans, stream, one_pass=True).sums()
    ends = {name.rpartition(".")[2]: fold.rpartition(".")[2] for name, fold in sums.inputs.items()}
    assert ends == {
        "q_proj": "q_proj",
        "k_proj": "q_proj",
        "v_proj": "q_proj",
        "o_proj": "o_proj",
        "gate_proj": "gate_proj",
        "up_proj": "gate_proj",
        "down_proj": "down_proj",
    }
    assert sums.folds.keys() == set(sums.inputs.values())


def test_parts_that_were_watched_apart_come_together() -> None:
    one, other = PartSums(inputs={"a": "a"}), PartSums(inputs={"b": "a"}, chosen={"mixture": [1, 2]})
    whole = PartSums.together([one, other])
    assert (whole.inputs, whole.chosen, whole.folds) == ({"a": "a", "b": "a"}, {"mixture": [1, 2]}, {})
