"""The layers with the highest figures are critical, as many as fill their share of the weights."""

from pathlib import Path

import pytest

from choices import bits_per_weight, plans_of, settled
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for
from dashq.quantizing.opening import open_model
from recipes import build_recipe


@pytest.mark.parametrize("by", ["sensitivity", "error", "snr"])
def test_the_most_critical_layers_fill_their_share(by: str, model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.2, "by": by}, "bits": 4}]
    recipe, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((what, critical),) = chosen.items()
    weights = {measured.name: measured.layer.weights for measured in analysis.layers}
    share = sum(weights[name] for name in critical) / sum(weights.values())
    assert what == f"override 1: critical by {by}, {share:.1%} of the weights"
    assert 0.2 - max(weights.values()) / sum(weights.values()) < share <= 0.2
    assert {name for name, plan in plans_of(recipe).items() if plan.scheme.bits == 4} == set(critical)

    def figure(name: str) -> float:
        measured = analysis.by_name[name]
        own = next(choice for choice in measured.choices if (choice.bits, choice.size) == (3, 16))
        assert measured.signal_to_noise
        noise = measured.signal_to_noise.off_diagonal[2]
        return {"sensitivity": own.sensitivity / measured.layer.weights, "error": own.error, "snr": noise}[by]

    left_out = [name for name in weights if name not in critical and weights[name] == min(weights.values())]
    assert min(map(figure, critical)) >= max(map(figure, left_out))


def test_critical_layers_are_among_those_that_match(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"match": ".*_proj", "solver": "rtn"}, {"match": ".*mlp.*", "critical": {"share": 0.01}, "bits": 4}]
    _, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((what, critical),) = chosen.items()
    assert what.startswith("override 2: ")
    assert len(critical) == 1  # more than its share, but one at least
    assert ".mlp." in critical[0]


def test_critical_layers_can_be_left_as_they_are(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.1}, "skip": True}]
    recipe = build_recipe(model, tmp_path / "out", overrides=overrides)
    assert choices_for(recipe, open_model(recipe)).keys() == analysis.by_name.keys()
    result, chosen = settled(model, analysis, tmp_path, overrides=overrides)
    ((_, critical),) = chosen.items()
    assert plans_of(result).keys() == analysis.by_name.keys() - set(critical)


def test_critical_layers_keep_their_bits_in_a_budget(model: Path, analysis: Analysis, tmp_path: Path) -> None:
    overrides = [{"critical": {"share": 0.1}, "bits": 8}]
    recipe, chosen = settled(model, analysis, tmp_path, overrides=overrides, budget=5)
    critical = next(layers for what, layers in chosen.items() if "critical" in what)
    assert {name for name, plan in plans_of(recipe).items() if plan.scheme.bits == 8} == set(critical)
    assert bits_per_weight(recipe) <= 5
