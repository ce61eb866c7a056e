"""Regular expressions that would take for ever are refused before they are used."""

from pathlib import Path

import pytest

from commands import call
from dashq.errors import RecipeError
from dashq.recipe import patterns
from dashq.recipe.patterns import check_patterns, compiled
from recipes import small_recipe, write_recipe

NAMES = [f"model.layers.{number}.self_attn.q_proj" for number in range(30)]


@pytest.mark.parametrize("slow", ["(.+)+!", ".*.*.*.*.*.*.*.*.*.*.*.*!", "([a-z_.0-9]*)*!"])
def test_an_expression_that_takes_for_ever_is_named(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    with pytest.raises(RecipeError, match=r"takes more than 0.3 seconds for the names of the layers") as error:
        check_patterns([".*", slow, ".*q_proj"], NAMES)
    assert repr(slow) in str(error.value)


def test_every_usual_expression_passes() -> None:
    check_patterns([r".*\.down_proj", r"model\.layers\.(0|29)\..*", r"(?!.*lm_head).*", r"(.)\1*"], NAMES)
    check_patterns([], NAMES)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000, "(?P<x>a)(?P<x>b)"])
def test_what_is_no_expression_is_a_value_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        compiled(pattern)


@pytest.mark.parametrize("command", [["plan"], ["run"], ["analyze"], ["analyze", "--snr", "(.+)+!"]])
def test_every_command_refuses_it_in_one_line(
    command: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    overrides = [] if "--snr" in command else [{"match": "(.+)+!", "bits": 2}]
    recipe = write_recipe(tmp_path / "r.yaml", small_recipe(model, tmp_path / "out", overrides=overrides))
    outcome = call(command[0], recipe, *command[1:])
    assert outcome.code == 2
    assert outcome.errors.startswith("dashq: the regular expression '(.+)+!' takes more than 0.3 seconds")
    assert len(outcome.errors.splitlines()) == 1
