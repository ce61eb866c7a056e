"""A recipe's text becomes plain data whose entries know their places, and what is none is refused with its line."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dashq import RecipeError
from dashq.recipe.yaml_text import Document, Keys, apply_settings, parse

TEXT = """\
model: pico

calibration:
  dataset:
    - name: pydoc
      weight: 1
    - {name: c4, weight: 2}
scheme:
  bits: 3
  grouper: contiguous
"""
WORDS = st.text("abcxyz", min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(WORDS, values, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def written(path: Path, text: str) -> Document:
    path.write_text(text)
    return parse(path)


def keys_of(data: Any, keys: Keys = ()) -> set[Keys]:
    """The keys of all entries in nested data."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return {keys}.union(*(keys_of(value, (*keys, key)) for key, value in entries))


def test_every_entry_knows_its_line(path: Path) -> None:
    document = written(path, TEXT)
    assert document.data == yaml.safe_load(TEXT)
    lines: dict[Keys, int] = {
        (): 1,
        ("model",): 1,
        ("calibration",): 3,
        ("calibration", "dataset"): 4,
        ("calibration", "dataset", 0): 5,
        ("calibration", "dataset", 0, "name"): 5,
        ("calibration", "dataset", 0, "weight"): 6,
        ("calibration", "dataset", 1): 7,
        ("calibration", "dataset", 1, "weight"): 7,
        ("scheme", "grouper"): 10,
    }
    assert {keys: document.where(keys) for keys in lines} == {keys: f"{path}:{line}" for keys, line in lines.items()}


def test_an_entry_that_is_not_there_has_the_place_of_the_nearest_one_around_it(path: Path) -> None:
    document = written(path, TEXT)
    assert document.where(("scheme", "solver", "name")) == f"{path}:8"
    assert document.where(("calibration", "dataset", 2, "name")) == f"{path}:4"
    assert document.where(("serializer",)) == f"{path}:1"


@given(data=st.dictionaries(WORDS, VALUES, min_size=1, max_size=4), flow=st.booleans())
def test_what_is_read_is_what_was_written_and_nothing_is_without_a_place(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], flow: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    document = written(path, yaml.safe_dump(data, default_flow_style=flow))
    assert document.data == data
    assert document.places.keys() == keys_of(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: pico\nscheme: {bits: 3\nserializer: dashq\n", r"recipe\.yaml:3: not valid YAML: "),
        ("model: pico\n\tscheme: 3\n", r"recipe\.yaml:2: not valid YAML: "),
        ("model: \x07\n", r"recipe\.yaml: not valid YAML: "),
        ("model: pico\n---\nmodel: other\n", r"recipe\.yaml:2: not valid YAML: but found another document"),
        ("model: pico\n? [a, b]\n: 3\n", r"recipe\.yaml:2: not valid YAML: found unhashable key"),
        ("model: pico\nscheme: *absent\n", r"recipe\.yaml:2: not valid YAML: found undefined alias 'absent'"),
        ("model: !!python/name:os.system\n", r"recipe\.yaml:1: not valid YAML: could not determine a constructor"),
        ("model: pico\nmodel: other\n", r"recipe\.yaml:2: 'model' stands here twice$"),
        ("scheme:\n  bits: 4\n  bits: 5\n", r"recipe\.yaml:3: 'bits' stands here twice$"),
        ("overrides:\n- match: x\n  bits: 4\n  match: y\n", r"recipe\.yaml:4: 'match' stands here twice$"),
        ("", "recipe.yaml: a recipe is a mapping with entries such as `model:` and `scheme:`$"),
        ("# nothing yet\n", "a recipe is a mapping with entries such as `model:`"),
        ("- model\n", "a recipe is a mapping with entries such as `model:`"),
        ("pico\n", "a recipe is a mapping with entries such as `model:`"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused(text: str, message: str, path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        written(path, text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2024-13-01", "'2024-13-01' is no timestamp"),
        ("!!int three", "'three' is no int"),
        ("!!float x", "'x' is no float"),
        ("!!bool x", "'x' is no bool"),
        ("!!timestamp x", "'x' is no timestamp"),
        ("1" * 5000, f"'{'1' * 40}' is no int"),
        (r'"half \ud83d"', r"'half \\ud83d' is no str"),
    ],
)
def test_a_value_that_is_not_of_the_type_it_looks_like_is_refused_with_its_line(
    value: str, problem: str, path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"^{path}:3: not valid YAML: {problem}$"):
        written(path, f"model: pico\nscheme:\n  bits: [{value}]\n")
    with pytest.raises(RecipeError, match=r"^--set scheme\.bits=.*: the value is not valid YAML$"):
        apply_settings(written(path, TEXT), [f"scheme.bits={value}"])


def test_what_is_nested_without_end_is_refused(path: Path) -> None:
    message = f"^{path}: not valid YAML: it is nested too deeply, or an alias stands inside its own anchor$"
    with pytest.raises(RecipeError, match=message):
        written(path, "model: " + "[\n" * 5000)  # Python's limit is 1000; torch's compiler raises it to 2000


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^cannot read the recipe .*absent\.yaml: No such file"):
        parse(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"^cannot read the recipe .*: it is no file but a folder"):
        parse(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"^cannot read the recipe .*latin\.yaml: not UTF-8 text$"):
        parse(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("setting", "keys", "value"),
    [
        ("scheme.bits=2", ("scheme", "bits"), 2),
        ("output=b=c", ("output",), "b=c"),
        ("output=", ("output",), None),
        ("calibration.dataset.1.weight=7", ("calibration", "dataset", 1, "weight"), 7),
        ("overrides=[{match: x}]", ("overrides",), [{"match": "x"}]),
        ("scheme={bits: 2, grouper: channel}", ("scheme",), {"bits": 2, "grouper": "channel"}),
        ("scheme.solver.name=rtn", ("scheme", "solver", "name"), "rtn"),
    ],
)
def test_a_setting_replaces_one_entry_and_is_its_place(setting: str, keys: Keys, value: Any, path: Path) -> None:
    document = written(path, TEXT)
    changed = apply_settings(document, [setting])
    entry: Any = changed.data
    for key in keys:
        entry = entry[key]
    assert entry == value
    below = {k for k in keys_of(changed.data) if k[: len(keys)] == keys}
    assert {changed.where(k) for k in below} == {f"--set {setting}"}
    assert changed.where(("model",)) == f"{path}:1"
    assert document == written(path, TEXT)  # which is left as it was
    others = {k for k in keys_of(document.data) if k[: len(keys)] != keys and keys[: len(k)] != k}
    assert {k: changed.places[k] for k in others} == {k: document.places[k] for k in others}


def test_a_setting_is_the_place_of_an_entry_that_it_makes_on_the_way(path: Path) -> None:
    document = apply_settings(written(path, TEXT), ["schem.bits=3"])
    assert document.where(("schem",)) == document.where(("schem", "bits")) == "--set schem.bits=3"
    assert document.where(("scheme",)) == written(path, TEXT).where(("scheme",))


def test_a_setting_makes_parameters_of_a_plain_name_and_the_last_one_wins(path: Path) -> None:
    document = apply_settings(written(path, TEXT), ["scheme.grouper.size=8", "scheme.grouper.size=4"])
    assert document.data["scheme"]["grouper"] == {"name": "contiguous", "size": 4}
    assert document.where(("scheme", "grouper", "size")) == "--set scheme.grouper.size=4"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("scheme.bits", "expected key=value, such as scheme.bits=3"),
        ("=3", "expected key=value, such as scheme.bits=3"),
        ("scheme.bits=[", "the value is not valid YAML"),
        ("calibration.dataset.2.name=x", "2 is none of the 2 list entries, counted from 0"),
        ("calibration.dataset.-1.name=x", "'-1' is none of the 2 list entries, counted from 0"),
        ("calibration.dataset.all.name=x", "'all' is none of the 2 list entries, counted from 0"),
        ("calibration.dataset.².name=x", "'²' is none of the 2 list entries, counted from 0"),
        ("scheme.bits.deep=2", "'deep' is inside 3, which has no entries"),
    ],
)
def test_a_setting_that_cannot_be_made_is_named_with_the_reason(setting: str, reason: str, path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        apply_settings(written(path, TEXT), [setting])
    assert str(error.value) == f"--set {setting}: {reason}"


def laughs(first: str, more: str) -> str:
    """A few lines that aliases make ten thousand million values of."""
    lines = [f"a: &a {first}"]
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{name}: &{name} {more.format(', '.join([f'*{before}'] * 10))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs("[x, x]", "[{}]"), r":6: not valid YAML: more than 100,000 values, with those that aliases repeat"),
        (laughs("{k: x}", "{{<<: [{}]}}"), r"not valid YAML: more than 100,000 values"),
        ("model: &a [*a]", r":1: not valid YAML: an alias inside its own anchor"),
        ("a: &a {b: *a}", r":1: not valid YAML: an alias inside its own anchor"),
        ("model: pico\nseed: " + "9" * 10**6, r":2: not valid YAML: '9{40}' is no int"),
        ("seed: 1" + ":59" * 1000, r":1: not valid YAML: a number of 3,001 characters"),
        ("{[a]: b}", r":1: not valid YAML: found unhashable key"),
        ("[\n" * 5000, r"not valid YAML: it is nested too deeply"),
        ("# comment\n" * 500_000, r"it is larger than 4,194,304 bytes"),
    ],
)
def test_what_grows_without_bounds_is_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        parse(path)
    assert "\n" not in str(error.value)


def test_aliases_and_merged_mappings_are_read(path: Path) -> None:
    document = written(path, "a: &a {bits: 3, size: 16}\nb: *a\nc:\n  <<: *a\n  bits: 4\n")
    assert document.data["b"] == {"bits": 3, "size": 16}
    assert document.data["c"] == {"bits": 4, "size": 16}
    assert (document.where(("c", "bits")), document.where(("c", "size"))) == (f"{path}:5", f"{path}:3")


def test_pipes_and_devices_are_no_recipes(path: Path) -> None:
    os.mkfifo(path)
    for place in (path, Path("/dev/zero"), path.parent):
        with pytest.raises(RecipeError, match="it is no file but a folder, a pipe or a device"):
            parse(place)
    for place in (Path("x" * 5000), Path("a\0b")):
        with pytest.raises(RecipeError, match=r"cannot read the recipe .*: (File name too long|embedded null byte)"):
            parse(place)


@pytest.mark.parametrize("setting", [f"{'a.' * 5000}a=1", f"seed={'9' * 5000}", f"a={'[' * 5000}", f"{'9' * 5000}=1"])
def test_a_setting_without_bounds_is_refused(path: Path, setting: str) -> None:
    document = written(path, TEXT)
    if setting.startswith("9"):
        assert apply_settings(document, [setting]).data["9" * 5000] == 1
        return
    with pytest.raises(RecipeError, match=r"^--set "):
        apply_settings(document, [setting])
