"""The program that a recipe is for, and the recipe with what that program wants where it says nothing itself."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from dashq.errors import RecipeError
from dashq.programs import Level
from dashq.recipe.yaml_text import Document, Keys
from dashq.strict import Strict, first_mistake

FOR = "for"
MERGED = ("calibration", "scheme")  # whose entries win one by one; all other keys win as a whole
KEPT = ("model", "device", "dtype", "trust_remote_code", "calibration", "certificate_groups")  # for another program


class Purpose(Strict):
    """The target by its name, the bits of codes, or what a weight may take on average, and how good it shall be.

    Without `bits` they are those of the recipe's scheme, else 2.
    """

    name: str
    bits: Annotated[float, Field(ge=1, le=8)] | None = None
    level: Level = "usual"


def purpose_of(document: Document) -> Purpose | None:
    """The purpose that a recipe names; None where it names none, a `RecipeError` where it is not as it should be."""
    if FOR not in document.data:
        return None
    place, value = document.where((FOR,)), document.data[FOR]
    for key in ("model", "output"):
        if not isinstance(document.data.get(key), str):
            raise RecipeError(f"{place}: {FOR}: a recipe for a program needs `{key}` as well, a text")
    try:
        purpose = Purpose.model_validate({"name": value} if isinstance(value, str) else value)
    except ValidationError as error:
        raise RecipeError(f"{place}: {FOR}: {first_mistake(error)}") from error
    scheme = document.data.get("scheme")
    bits = scheme.get("bits") if isinstance(scheme, Mapping) else None
    return purpose if purpose.bits or not isinstance(bits, int) else purpose.model_copy(update={"bits": float(bits)})


def completed(document: Document, wanted: Mapping[str, Any]) -> tuple[Document, str, str]:
    """The recipe with what its target `wanted` where it says nothing itself, with two lists in words.

    One is of that, the other of what calibration and scheme of the recipe have in place of it, the text left out, which
    no target chooses. Overrides of the target come first, so that those of the recipe win.
    """
    own = {key: value for key, value in document.data.items() if key != FOR}
    data, chosen, kept = dict(own), dict[str, Any](), list[str]()
    places = dict(document.places)
    for key, value in wanted.items():
        place = f"{document.where((FOR,))}: {FOR}"
        if key in MERGED and isinstance(own.get(key), Mapping):
            data[key] = {**value, **own[key]}
            chosen |= {f"{key}.{entry}": value[entry] for entry in value.keys() - own[key].keys()}
            places |= {(key, entry): place for entry in value.keys() - own[key].keys()}
            kept += [
                f"{key}.{entry}: {_in_one_line(own[key][entry])} ({_in_one_line(value[entry])})"
                for entry in sorted(value.keys() & own[key].keys())
                if _named(own[key][entry]) != _named(value[entry]) and entry != "dataset"
            ]
        elif key == "overrides" and isinstance(own.get(key), list):
            data[key] = [*value, *own[key]]
            chosen[key] = value
            places = _moved(places, len(value)) | {(key, index): place for index in range(len(value))}
        elif key not in own:
            data[key] = chosen[key] = value
            places[(key,)] = place
    listed = "; ".join(f"{key}: {_in_one_line(chosen[key])}" for key in sorted(chosen))
    return replace(document, data=data, places=places), listed, "; ".join(kept)


def for_another(document: Document, purpose: Purpose, output: str) -> str:
    """The text of a recipe for the same model and text, with another purpose and output."""
    data = {key: document.data[key] for key in KEPT if key in document.data}
    kept = purpose.model_dump(exclude_none=True)
    return yaml.safe_dump({"model": data.pop("model", None), "output": output, FOR: kept, **data}, sort_keys=False)


def _moved(places: Mapping[Keys, str], count: int) -> dict[Keys, str]:
    """Places in which the recipe's own overrides follow some others."""
    return {
        ("overrides", keys[1] + count, *keys[2:])
        if len(keys) > 1 and keys[0] == "overrides" and isinstance(keys[1], int)
        else keys: place
        for keys, place in places.items()
    }


def _named(value: Any) -> Any:
    """The name alone of a strategy without settings, which may be written either way."""
    return value["name"] if isinstance(value, Mapping) and value.keys() == {"name"} else value


def _in_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")
