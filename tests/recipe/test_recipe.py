"""Recipes load, and each mistake in one is named with its file, its line and what would be right."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dashq import Recipe, RecipeError, load_recipe
from dashq.recipe.recipe import Calibration, Override, Scheme, read_tuner
from dashq.strict import Strict
from dashq.text_source import TextSource
from recipes import REGISTRY

SHIPPED = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))

TEXT = """\
model: pico
output: out
calibration:
  dataset:
    - name: pydoc
      weight: 1
  samples: 3
scheme:
  bits: 3
  estimator: diagonal
  grouper: {name: contiguous, size: 16}
  solver:
    name: irls
    iterations: 4
overrides:
  - match: '.*down_proj'
    bits: 4
    solver: rtn
serializer: dashq
"""


def load(folder: Path, text: str, *settings: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, REGISTRY, settings)


def refusal(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(folder, text, *settings)
    return str(error.value)


def allowed(record: type[Strict]) -> str:
    return f"Allowed here: {', '.join(record.model_fields)}"


def as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(json.loads(recipe.model_dump_json()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_being_written_down(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, REGISTRY)
    assert load(tmp_path, as_yaml(recipe)) == recipe


@given(
    st.fixed_dictionaries(
        {
            "bits": st.integers(1, 8),
            "estimator": st.just("diagonal"),
            "grouper": st.fixed_dictionaries(
                {"name": st.just("contiguous"), "size": st.integers(1, 512)},
                optional={"uneven": st.sampled_from(["error", "divisor", "pad"])},
            )
            | st.just("channel"),
            "solver": st.sampled_from(["rtn", "irls", {"name": "irls", "preset": "paper"}])
            | st.fixed_dictionaries({"name": st.just("irls"), "damping": st.floats(0, 1, exclude_max=True)}),
        },
        optional={"router": st.sampled_from(["routed", "every_expert"]), "skip": st.booleans()},
    )
)
def test_a_recipe_survives_being_written_down(scheme: dict[str, object]) -> None:
    data = yaml.safe_load(TEXT)
    data["scheme"], data["overrides"] = scheme, [{"match": r"a\.(b|c)", **scheme}]
    recipe = Recipe.model_validate(data, context=REGISTRY)
    assert Recipe.model_validate(yaml.safe_load(as_yaml(recipe)), context=REGISTRY) == recipe


def test_a_plain_name_is_a_strategy_with_its_defaults(tmp_path: Path) -> None:
    scheme = load(tmp_path, TEXT.replace("    name: irls\n    iterations: 4\n", "    name: irls\n")).scheme
    assert scheme.solver == load(tmp_path, TEXT, "scheme.solver=irls").scheme.solver == REGISTRY.solvers["irls"]()


@pytest.mark.parametrize(
    ("right", "wrong", "nearest", "keys"),
    [
        ("model: pico", "modle: pico", "model", allowed(Recipe)),
        ("samples: 3", "sampels: 3", "samples", allowed(Calibration)),
        ("weight: 1", "wieght: 1", "weight", allowed(TextSource)),
        ("bits: 3", "bit: 3", "bits", allowed(Scheme)),
        ("size: 16", "sise: 16", "size", "Allowed here: size, uneven"),
        ("iterations: 4", "iteration: 4", "iterations", allowed(REGISTRY.solvers["irls"])),
        ("bits: 4", "btis: 4", "bits", allowed(Override)),
        ("solver: rtn", "solver: {name: rtn, size: 4}", None, "no keys at all"),
        ("serializer: dashq", "serializer: {name: dashq, dtyp: float16}", "dtype", "Allowed here: dtype"),
    ],
)
def test_an_unknown_key_at_any_depth_is_found(
    right: str, wrong: str, nearest: str | None, keys: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, TEXT.replace(right, wrong))
    line = TEXT[: TEXT.index(right)].count("\n") + 1
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:{line}: ")
    assert "unknown key" in message
    assert keys in message
    assert (f"Did you mean {nearest!r}?" if nearest else "unknown key") in message


RENAMED = [
    ("samples: 3", "tokens: 3", "calibration.tokens", "unknown key 'tokens': it is called sequence_length now"),
    (
        "samples: 3",
        "prefix_correction: 1",
        "calibration.prefix_correction",
        "unknown key 'prefix_correction': it is called error_correction now",
    ),
    ("bits: 3", "pooling: 3", "scheme.pooling", "unknown key 'pooling': it is called pooling_tokens now"),
    ("bits: 4", "pooling: 4", "overrides.0.pooling", "unknown key 'pooling': it is called pooling_tokens now"),
    ("model: pico", "certificate: 0", "certificate", "unknown key 'certificate': it is called certificate_groups now"),
]


@pytest.mark.parametrize(("right", "wrong", "key", "message"), RENAMED)
def test_a_key_with_its_earlier_name_is_refused_with_the_new_one(
    right: str, wrong: str, key: str, message: str, tmp_path: Path
) -> None:
    line = TEXT[: TEXT.index(right)].count("\n") + 1
    told = refusal(tmp_path, TEXT.replace(right, wrong)).splitlines()
    assert told == [f"{tmp_path / 'recipe.yaml'}:{line}: {key}: {message}"]
    assert refusal(tmp_path, TEXT, f"{key}=1") == f"--set {key}=1: {key}: {message}"


@pytest.mark.parametrize(("right", "wrong", "key", "message"), RENAMED)
def test_the_new_name_of_a_key_is_one(right: str, wrong: str, key: str, message: str, tmp_path: Path) -> None:
    new = message.split()[-2]
    place = key.rpartition(".")[0]
    assert load(tmp_path, TEXT, f"{place}.{new}=1".removeprefix(".")) != load(tmp_path, TEXT)


def test_a_recipe_keeps_the_registry_that_it_was_read_with(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    assert recipe.registry is recipe.model_copy(update={"output": tmp_path}).registry is REGISTRY
    assert Recipe.model_validate(dict(recipe)).registry == REGISTRY  # built from strategies: of the installed plugins


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("bits: 3", "bits: three", "scheme.bits: should be a whole number, not 'three'"),
        ("bits: 3", "bits: 9", "scheme.bits: should be less than or equal to 8, not 9"),
        ("bits: 4", "bits: 0", "overrides.0.bits: should be greater than or equal to 1, not 0"),
        ("samples: 3", "samples: -1", "calibration.samples: should be greater than 0, not -1"),
        ("weight: 1", "weight: heavy", "calibration.dataset.0.weight: should be a number, not 'heavy'"),
        ("size: 16", "size: 1.5", "scheme.grouper.size: should be a whole number, not 1.5"),
        ("iterations: 4", "iterations: []", r"scheme.solver.iterations: should be a whole number, not \[\]"),
        ("match: '.*down_proj'", "match: '('", r"overrides.0.match: '\(' is no regular expression: missing \)"),
        ("estimator: diagonal", "estimator: 7", "scheme.estimator: should be a name or a mapping with a `name`, not 7"),
        (
            "solver:\n    name: irls",
            "solver:\n    preset: paper",
            "scheme.solver: a `name` is missing. Installed: .*irls",
        ),
        ("model: pico", "model: [pico]", r'model: should be text, not \["pico"\]'),
        ("model: pico", "dtype: int8\nmodel: pico", "dtype: should be 'auto', 'float32',.*, not 'int8'"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(right: str, wrong: str, message: str, tmp_path: Path) -> None:
    line = TEXT[: TEXT.index(right)].count("\n") + 1
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:{line}: {message}"):
        load(tmp_path, TEXT.replace(right, wrong))


@pytest.mark.parametrize(
    ("right", "wrong", "kind", "message"),
    [
        ("estimator: diagonal", "estimator: diagonl", "estimators", "no estimator named 'diagonl'. Did you mean"),
        ("name: contiguous", "name: contigous", "groupers", "no grouper named 'contigous'. Did you mean"),
        ("name: irls", "name: [irls]", "solvers", "no solver named"),
        ("solver: rtn", "solver: gptq", "solvers", "no solver named 'gptq'. Installed"),
        ("solver: rtn", "router: top", "routers", "no router named 'top'"),
        ("serializer: dashq", "serializer: {name: dash}", "serializers", "no format named 'dash'. Did you mean"),
    ],
)
def test_an_unknown_strategy_lists_the_installed_ones(
    right: str, wrong: str, kind: str, message: str, tmp_path: Path
) -> None:
    answer = refusal(tmp_path, TEXT.replace(right, wrong))
    assert message in answer
    assert f"Installed: {', '.join(getattr(REGISTRY, kind))}" in answer


@pytest.mark.parametrize(
    ("entry", "rest", "key", "line"),
    [
        ("model: pico\n", "", "model", 1),
        ("  bits: 3\n", "", "scheme.bits", 8),
        ("serializer: dashq\n", "", "serializer", 1),
    ],
)
def test_a_missing_entry_is_named_at_what_it_is_missing_from(
    entry: str, rest: str, key: str, line: int, tmp_path: Path
) -> None:
    message = f"{tmp_path / 'recipe.yaml'}:{line}: {key}: this entry is missing"
    assert refusal(tmp_path, TEXT.replace(entry, rest)) == message


def test_an_override_says_which_layers_it_is_for(tmp_path: Path) -> None:
    answer = refusal(tmp_path, TEXT.replace("  - match: '.*down_proj'\n    bits: 4\n", "  - bits: 4\n"))
    assert (
        answer == f"{tmp_path / 'recipe.yaml'}:16: overrides.0: an override needs `match`, `critical` or both, to say "
        "which layers it is for"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("critical: {share: 0}", r"overrides\.0\.critical\.share: .*greater than 0, not 0"),
        ("critical: {share: 1.5}", r"overrides\.0\.critical\.share: .*less than 1, not 1\.5"),
        (
            "critical: {share: 0.1, by: luck}",
            r"overrides\.0\.critical\.by: .*'sensitivity', 'error' or 'snr', not 'luck'",
        ),
        ("critical: {by: snr}", r"overrides\.0\.critical\.share: this entry is missing"),
        ("critical: 0.1", r"overrides\.0\.critical: .*"),
    ],
)
def test_what_is_critical_is_said_in_full(entry: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(tmp_path, TEXT.replace("match: '.*down_proj'", entry)))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0", r"budget\.bits_per_weight: .*greater than 0, not 0"),
        ("{bits: 2}", r"budget\.bits_per_weight: this entry is missing"),
        ("{bits_per_weight: 3, bits: [2, 9]}", r"budget\.bits\.1: .*less than or equal to 8, not 9"),
        ("{bits_per_weight: 3, groupers: [contigous]}", r"no grouper named 'contigous'\. Did you mean 'contiguous'\?"),
        ("much", r"budget\.bits_per_weight: should be a number, not 'much'"),
    ],
)
def test_a_budget_is_a_number_or_says_what_it_may_be_spent_on(budget: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(tmp_path, TEXT + f"budget: {budget}\n"))


@pytest.mark.parametrize("propagate", ["quantized", "sequential"])
def test_what_calibration_learns_is_kept_only_where_nothing_quantized_changes_it(
    propagate: str, tmp_path: Path
) -> None:
    text = TEXT.replace("samples: 3", f"samples: 3\n  keep: ~/kept\n  propagate: {propagate}")
    message = (
        "calibration: `keep` is for what depends on nothing that is quantized, and with "
        f"`propagate: {propagate}` each block is calibrated behind quantized ones: leave `keep` out, or use "
        "`propagate: original`"
    )
    assert refusal(tmp_path, text) == f"{tmp_path}/recipe.yaml:3: {message}"
    recipe = load(tmp_path, text, "calibration.propagate=original")
    assert recipe.keep == Path("~/kept").expanduser()
    assert load(tmp_path, TEXT).keep is None
    sweep = load(tmp_path, TEXT).keeping(tmp_path)
    assert sweep.keep == tmp_path
    assert sweep.model_copy(update={"budget": None}).keep == tmp_path
    assert sweep.model_dump() == load(tmp_path, TEXT).model_dump()  # a result's recipe does not name it


def test_a_number_is_a_budget_of_so_many_bits(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + "budget: 2.5\n")
    recipe = load_recipe(path, REGISTRY)
    assert recipe.measures
    assert recipe.budget
    assert (recipe.budget.bits_per_weight, recipe.budget.bits, recipe.budget.groupers) == (2.5, (), ())


def test_every_mistake_has_its_own_line(tmp_path: Path) -> None:
    text = TEXT.replace("bits: 3", "bits: x").replace("samples: 3", "samples: y").replace("serializer: dashq\n", "")
    assert [line.split(": ")[1] for line in refusal(tmp_path, text).splitlines()] == [
        "calibration.samples",
        "scheme.bits",
        "serializer",
    ]


def test_settings_replace_entries_of_the_recipe(tmp_path: Path) -> None:
    settings = ("scheme.bits=2", "calibration.dataset.0.weight=7", "overrides.0.skip=true", "device=cpu", "output=b=c")
    recipe = load(tmp_path, TEXT, *settings)
    assert recipe.scheme.bits == 2
    assert recipe.calibration.dataset[0].weight == 7
    assert recipe.overrides[0].skip is True
    assert recipe.device == "cpu"
    assert recipe.output == Path("b=c")
    untouched = load(tmp_path, TEXT)
    assert recipe.scheme.solver == untouched.scheme.solver
    assert recipe.overrides[0].bits == untouched.overrides[0].bits


def test_a_setting_turns_a_plain_name_into_parameters_and_the_last_one_wins(tmp_path: Path) -> None:
    settings = ("scheme.grouper=contiguous", "scheme.grouper.size=8", "scheme.grouper.size=4")
    assert load(tmp_path, TEXT, *settings).scheme.grouper.size_for(16) == 4
    assert load(tmp_path, TEXT, "overrides=[]", "calibration.dataset=c4").overrides == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scheme.bit=2", "--set scheme.bit=2: scheme.bit: unknown key 'bit'. Did you mean 'bits'?"),
        ("scheme.bits=many", "--set scheme.bits=many: scheme.bits: should be a whole number, not 'many'"),
        ("scheme.solver.name=gptq", "--set scheme.solver.name=gptq: scheme.solver.name: no solver named 'gptq'"),
    ],
)
def test_a_setting_that_is_wrong_is_named(setting: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, TEXT, setting)


def test_an_override_replaces_whole_entries(tmp_path: Path) -> None:
    grouper = "    grouper: contiguous\n"
    recipe = load(tmp_path, TEXT.replace("    bits: 4\n", grouper))
    scheme = recipe.overrides[0].apply(recipe.scheme)
    assert scheme.grouper == REGISTRY.groupers["contiguous"]()  # the scheme's size: 16 is gone
    assert scheme.solver == REGISTRY.solvers["rtn"]()
    assert scheme.bits == recipe.scheme.bits


def test_recipes_cannot_be_changed_once_loaded(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT)
    with pytest.raises(ValueError, match="frozen"):
        recipe.scheme.bits = 2


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("bits: 3", "bits: true", "scheme.bits: should be a whole number, not true"),
        ("bits: 3", "bits: '3'", "scheme.bits: should be a whole number, not '3'"),
        ("bits: 3", "bits: 3.0", "scheme.bits: should be a whole number, not 3.0"),
        ("weight: 1", "weight: true", "calibration.dataset.0.weight: should be a number, not true"),
        ("samples: 3", "packing: 1", "calibration.packing: should be true or false, not 1"),
        ("samples: 3", "packing: 'yes'", "calibration.packing: should be true or false, not 'yes'"),
        ("size: 16", "size: false", "scheme.grouper.size: should be a whole number, not false"),
        ("model: pico", "model: 7", "model: should be text, not 7"),
        ("output: out", "output: [out]", 'output: should be a path, not ["out"]'),
        ("samples: 3", "beginning: always", "calibration.beginning: should be auto, true or false, not 'always'"),
        ("samples: 3", f"seed: {2**64}", f"calibration.seed: should be less than {2**64}, not {2**64}"),
        ("scheme:", "budget: .inf\nscheme:", "budget.bits_per_weight: should be a finite number, not Infinity"),
        ("scheme:", "budget: .nan\nscheme:", "budget.bits_per_weight: should be "),
        ("scheme:", "budget: true\nscheme:", "budget.bits_per_weight: should be a number, not true"),
        (
            "scheme:",
            "budget: {bits_per_weight: 3, bits: [2, true]}\nscheme:",
            "budget.bits.1: should be a whole number",
        ),
        ("model: pico", 'model: "a\\0b"', "model: 'a\\x00b' can be no path: embedded null byte"),
        ("output: out", f"output: {'x' * 300}", "can be no path: File name too long"),
        (
            "match: '.*down_proj'",
            "match: 'a{99999999999}'",
            "is no regular expression: the repetition number is too large",
        ),
    ],
)
def test_a_value_of_another_type_is_not_guessed_at(right: str, wrong: str, message: str, tmp_path: Path) -> None:
    answer = refusal(tmp_path, TEXT.replace(right, wrong, 1))
    assert message in answer
    assert "\n" not in answer
    assert not re.search(r"tuple|dict|instance|None|True|False", answer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("calibration: pydoc", "calibration: should be a mapping, not 'pydoc'"),
        (
            "calibration: {dataset: -1}",
            "calibration.dataset.0: should be the name of a text, a mapping with a `name`, or a list of these, not -1",
        ),
        (
            "budget: [3]",
            "budget: should be a number of bits per weight, or a mapping with `bits_per_weight`, not [3]",
        ),
        ("overrides: {bits: 2}", 'overrides: should be a list, not {"bits": 2}'),
        ("scheme: null", "scheme: should be a mapping, not null"),
    ],
)
def test_what_is_needed_is_said_in_the_words_of_yaml(wrong: str, message: str, tmp_path: Path) -> None:
    data = yaml.safe_load(TEXT) | yaml.safe_load(wrong)
    assert refusal(tmp_path, yaml.safe_dump(data)).endswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output", "a\0b", r"output: 'a\x00b' can be no path"),
        ("a\0b", 1, r"'a\x00b': unknown key 'a\x00b'"),
        ("device", "../../x", "device: should be auto, cpu, cuda or cuda:N, not '../../x'"),
    ],
)
def test_what_is_said_of_a_wrong_value_can_be_printed(key: str, value: object, message: str, tmp_path: Path) -> None:
    answer = refusal(tmp_path, yaml.safe_dump(yaml.safe_load(TEXT) | {key: value}))
    assert message in answer
    assert answer.isprintable()


def test_numbers_without_a_fraction_are_numbers(tmp_path: Path) -> None:
    recipe = load(tmp_path, TEXT, "budget=3", "calibration.error_correction=1", "calibration.beginning=true")
    assert recipe.budget
    assert (recipe.budget.bits_per_weight, recipe.calibration.error_correction) == (3.0, 1.0)
    assert recipe.calibration.beginning is True


def test_a_number_may_have_an_exponent_and_no_point(tmp_path: Path) -> None:
    scheme = load(tmp_path, TEXT, "scheme.solver={name: irls, ridge: 1e-3}", "calibration.error_correction=1E-1").scheme
    assert scheme.solver.model_dump()["ridge"] == 0.001


def test_mistakes_at_all_depths_are_told_together(tmp_path: Path) -> None:
    text = TEXT.replace("samples: 3", "tokens: 3\n  packing: 1").replace("bits: 4", "bits: 4\n    pooling: 1")
    answer = refusal(tmp_path, text + "certificate: 0\n").splitlines()
    assert [line.split(": ")[1] for line in answer] == [
        "certificate",
        "calibration.tokens",
        "calibration.packing",
        "overrides.0.pooling",
    ]


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("calibration.dataset.weight=heavy", "calibration.dataset.0.weight"),
        ("calibration.dataset={name: pydoc, splitt: test}", "calibration.dataset.0.splitt"),
        ("calibration.dataset.split=[test]", "calibration.dataset.0.split"),
        ("budget=much", "budget.bits_per_weight"),
        ("overrides.0.match=(", "overrides.0.match"),
        ("scheme={bits: 3}", "scheme.estimator"),
    ],
)
def test_a_mistake_of_a_setting_is_told_of_the_setting(setting: str, place: str, tmp_path: Path) -> None:
    text = TEXT.replace("\n    - name: pydoc\n      weight: 1", " pydoc")
    assert refusal(tmp_path, text, setting).startswith(f"--set {setting}: {place}: ")


def test_a_tuner_is_named_with_its_parameters_and_there_is_none_by_default(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).tuner is None
    recipe = load(tmp_path, f"{TEXT}tuner: {{name: distill, samples: 7, dataset: [pydoc, {{name: c4, weight: 2}}]}}\n")
    assert recipe.tuner
    assert (recipe.tuner.name, recipe.tuner.samples, recipe.tuner.steps) == ("distill", 7, 7)
    assert [source.name for source in recipe.tuner.dataset or ()] == ["pydoc", "c4"]
    assert Recipe.model_validate(yaml.safe_load(as_yaml(recipe)), context=REGISTRY) == recipe


@pytest.mark.parametrize(
    ("tuner", "place", "message"),
    [
        ("distil", "tuner.name", "no tuner named 'distil'. Did you mean 'distill'? Installed: distill"),
        ("{samples: 3}", "tuner", "a `name` is missing. Installed: distill"),
        ("{name: distill, samples: 0}", "tuner.samples", "should be greater than 0, not 0"),
        ("{name: distill, dataset: {name: pydoc, sqlit: 1}}", "tuner.dataset.0.sqlit", "unknown key 'sqlit'."),
        ("{name: distill, scales: 0, offsets: 0, norms: 0}", "tuner", "one of `scales`, `offsets` and `norms` must be"),
    ],
)
def test_a_mistake_inside_a_tuner_is_named_with_its_line(tuner: str, place: str, message: str, tmp_path: Path) -> None:
    line = len(TEXT.splitlines()) + 1
    assert f"recipe.yaml:{line}: {place}: {message}" in refusal(tmp_path, f"{TEXT}tuner: {tuner}\n")


def test_the_command_line_names_a_tuner_as_a_recipe_does() -> None:
    assert read_tuner("distill", REGISTRY).model_dump()["name"] == "distill"
    assert read_tuner("{name: distill, samples: 7}", REGISTRY).samples == 7
    for text, message in (
        ("distil", "no tuner named 'distil'. Did you mean 'distill'?"),
        ("{name: distill, samples: no}", "the tuner '{name: distill, samples: no}': samples: "),
        ("[", "the tuner '[' is not valid YAML"),
        ("3", "the tuner '3': should be a name or a mapping"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            read_tuner(text, REGISTRY)
