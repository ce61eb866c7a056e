"""The shape of the house: imports run one way, the core knows no plugin, and manners that a program can check."""

import ast
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import jaxtyping
import pytest
import torch

from dashq.data import Grouping
from dashq.strategies import KINDS
from dashq_plugins.formats.packing import pack_bits, unpack_bits
from recipes import REGISTRY

ROOT = Path(__file__).parents[1]
CORE = {path: ast.parse(path.read_text()) for path in sorted(ROOT.glob("core/**/*.py"))}
PLUGINS = {path: ast.parse(path.read_text()) for path in sorted(ROOT.glob("plugins/**/*.py"))}
EVERYTHING = CORE | PLUGINS
MODULES_BESIDE_THE_ROOMS = 16
PARAMETERS = 7
QUOTED = re.compile(r"(?:`|')([\w-]+)(?:`|')")
# Each room, and all that it may import besides itself and the modules beside the rooms that stand at the bottom.
BOTTOM = {
    "curvature",
    "data",
    "device",
    "errors",
    "hooks",
    "programs",
    "registry",
    "strategies",
    "strict",
    "text_source",
}
ROOMS: dict[str, set[str]] = {
    "recipe": set(),
    "model": set(),
    "solving": set(),
    "processes": set(),
    "calibration": {"recipe", "model", "processes"},
    "runtime": {"model"},
    "results": {"recipe", "model", "solving", "runtime", "processes"},
    "tuning": {"recipe", "model", "solving", "processes", "calibration", "results"},
    "measuring": {"recipe", "model", "solving", "processes", "calibration", "results", "runtime", "tuning"},
    "quantizing": {"recipe", "model", "solving", "processes", "calibration", "results", "tuning"},
    "testing": {"solving", "runtime", "processes"},
    "pipeline": {
        "recipe",
        "model",
        "solving",
        "processes",
        "calibration",
        "measuring",
        "quantizing",
        "results",
        "tuning",
    },
    "estimate": {"recipe", "model", "solving", "processes", "calibration", "measuring", "tuning"},
}


# Where the specifications of each package lie, and the modules that have none of their own, each with the reason.
SPECIFICATIONS = {"core/dashq": "tests", "core/dashq_cli": "tests/cli", "plugins/dashq_plugins": "tests/plugins"}
UNSPECIFIED: dict[str, str] = {}


def imports(module: ast.Module) -> Iterator[str]:
    """The modules that a module imports, wherever it does."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room, or the module beside the rooms, that a dotted name of the core belongs to."""
    package, _, rest = name.partition(".")
    return rest.split(".")[0] if package == "dashq" and rest else None


def rooms_of_core() -> dict[str, set[str]]:
    """For each room or module beside the rooms those that it imports; `__init__` only re-exports."""
    arrows: dict[str, set[str]] = {}
    for path, module in CORE.items():
        place = path.relative_to(ROOT / "core")
        if place.parts[0] == "dashq" and place.parts[1] != "__init__.py":
            own = place.parts[1].removesuffix(".py")
            arrows.setdefault(own, set()).update(target for name in imports(module) if (target := room(name)))
    return {own: targets - {own} for own, targets in arrows.items()}


def test_the_modules_are_found() -> None:
    assert {"pipeline.py", "registry.py", "quantize.py"} <= {path.name for path in CORE}
    assert {"irls.py", "native.py"} <= {path.name for path in PLUGINS}


def test_few_modules_stand_beside_the_rooms() -> None:
    beside = [path.name for path in CORE if path.parent == ROOT / "core" / "dashq"]
    assert len(beside) <= MODULES_BESIDE_THE_ROOMS
    assert {path.parent.name for path in CORE if path.parent.parent == ROOT / "core" / "dashq"} <= ROOMS.keys()


@pytest.mark.parametrize("own", ROOMS)
def test_a_room_imports_only_those_below_it(own: str) -> None:
    assert rooms_of_core()[own] - BOTTOM <= ROOMS[own]


def test_the_modules_at_the_bottom_import_no_room() -> None:
    arrows = rooms_of_core()
    assert not {own: arrows[own] - BOTTOM for own in BOTTOM if arrows.get(own, set()) - BOTTOM}


def test_no_circle_of_rooms() -> None:
    order = list(TopologicalSorter(rooms_of_core()).static_order())
    assert order.index("data") < order.index("strategies") < order.index("hooks") < order.index("registry")


def test_no_circle_of_modules() -> None:
    names = {".".join(path.relative_to(ROOT / "core").with_suffix("").parts): module for path, module in CORE.items()}
    arrows = {
        own: {target for name in imports(module) for target in (name, name.rpartition(".")[0]) if target in names}
        for own, module in names.items()
        if not own.endswith("__init__")
    }
    assert list(TopologicalSorter(arrows).static_order())


def test_the_core_imports_no_plugin() -> None:
    packages = {path: {name.split(".")[0] for name in imports(module)} for path, module in CORE.items()}
    assert not [path for path, names in packages.items() if "dashq_plugins" in names]


def test_the_core_names_no_strategy() -> None:
    # The project's name as well, and the word for weights that are unpacked before they are multiplied with.
    strategies = {name for kind in KINDS for name in getattr(REGISTRY, kind)} - {"dashq", "exact"}
    literals = {
        path: {node.value for node in ast.walk(module) if isinstance(node, ast.Constant)}
        for path, module in CORE.items()
    }
    assert not {path: names & strategies for path, names in literals.items() if names & strategies}


def test_the_core_names_no_file_of_a_format() -> None:
    files = {file for cls in REGISTRY.serializers.values() for file in cls.files}
    literals = {
        path: {node.value for node in ast.walk(module) if isinstance(node, ast.Constant)}
        for path, module in CORE.items()
    }
    assert files
    assert not {path: names & files for path, names in literals.items() if names & files}


def test_the_texts_of_plugins_quote_no_strategy_but_their_own() -> None:
    owners = {name: cls.__module__ for kind in KINDS for name, cls in getattr(REGISTRY, kind).items()}
    quoted = {
        f"{path}:{node.lineno}": names
        for path, module in PLUGINS.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (names := owners.keys() & set(QUOTED.findall(node.value)) - _own(path, owners))
    }
    assert not quoted


def test_plugins_import_no_command_line_and_no_plugin_of_another_kind() -> None:
    for path, module in PLUGINS.items():
        place = path.relative_to(ROOT / "plugins").parts
        targets = {tuple(name.split(".")) for name in imports(module)}
        assert not [target for target in targets if target[0] == "dashq_cli"], path
        assert {target[1] for target in targets if target[0] == "dashq_plugins"} <= {place[1]}, path


def test_default_plugins_know_nothing_of_each_other() -> None:
    entries = importlib.metadata.distribution("dashq").entry_points.select(group="dashq")
    plugins = {entry.value for entry in entries}
    for path, module in PLUGINS.items():
        own = ".".join(path.relative_to(ROOT / "plugins").with_suffix("").parts)
        targets = {name.rpartition(".")[0] for name in imports(module)}
        assert not (targets - {own}) & plugins, path


def test_every_plugin_is_a_module_with_an_entry_point() -> None:
    entries = importlib.metadata.distribution("dashq").entry_points.select(group="dashq")
    answering = {
        ".".join(path.relative_to(ROOT / "plugins").with_suffix("").parts)
        for path, module in PLUGINS.items()
        if any(isinstance(node, ast.FunctionDef) and node.name.startswith("dashq_") for node in module.body)
    }
    assert {entry.value for entry in entries} == answering


def test_every_module_has_a_specification_of_its_name_in_the_same_room() -> None:
    modules = [path for path in EVERYTHING if path.stem not in ("__init__", "__main__")]
    missing = {str(path.relative_to(ROOT)) for path in modules if not _specification(path).is_file()}
    assert missing == UNSPECIFIED.keys()


def test_every_specification_in_a_room_names_a_module_of_it() -> None:
    modules = {_specification(path) for path in EVERYTHING}
    rooms_under_test = {path.parent for path in modules} - {ROOT / "tests", ROOT / "tests" / "cli"}
    strays = {path for room in rooms_under_test for path in room.glob("test_*.py")} - modules
    assert not strays


def test_every_module_opens_with_one_sentence() -> None:
    openings = {
        path: (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ")
        for path, module in EVERYTHING.items()
    }
    assert not {path: text for path, text in openings.items() if not text.endswith(".") or ". " in text or "? " in text}


def test_no_function_takes_more_than_seven_parameters() -> None:
    counts = {
        f"{path}:{node.lineno} {node.name}": len({*_parameters(node)} - {"self", "cls"})
        for path, module in EVERYTHING.items()
        if "dashq_cli" not in path.parts  # a command's parameters are its options
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
    }
    assert not {place: count for place, count in counts.items() if count > PARAMETERS}


def test_no_class_name_is_used_twice() -> None:
    places: dict[str, list[Path]] = {}
    for path, module in EVERYTHING.items():
        for node in module.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_shapes_are_checked_while_tests_run() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    assert unpack_bits(pack_bits(codes, 3), 3, 8).equal(codes)
    with pytest.raises(jaxtyping.TypeCheckError):
        pack_bits(codes[0], 3)
    grouping = Grouping(columns=8, size=4)
    with pytest.raises(jaxtyping.TypeCheckError):
        grouping.join(codes[0])


def test_docstrings_begin_with_their_subject() -> None:
    headless = ("What ", "Where ", "How ", "By ", "Which ", "Whether ")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = {
        f"{path}:{getattr(node, 'lineno', 1)}": ast.get_docstring(node) or ""
        for path, module in EVERYTHING.items()
        for node in ast.walk(module)
        if isinstance(node, documented)
    }
    assert not {place: text for place, text in texts.items() if text.startswith(headless)}


def test_every_tensor_parameter_has_a_shape() -> None:
    bare = [
        f"{path}:{node.lineno} {node.name}({parameter.arg})"
        for path, module in EVERYTHING.items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        for parameter in _arguments(node)
        if parameter.annotation and _has_a_bare_tensor(parameter.annotation)
    ]
    assert not bare


def _own(path: Path, owners: Mapping[str, str]) -> set[str]:
    """The strategies of the plugin, a module or a package in one of the rooms, that a module belongs to."""
    plugin = path.relative_to(ROOT / "plugins").with_suffix("").parts[:3]
    return {name for name, module in owners.items() if tuple(module.split(".")[:3]) == plugin}


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(arg for arg in (a.vararg, a.kwarg) if arg)]


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in _arguments(function)]


def _has_a_bare_tensor(annotation: ast.expr) -> bool:
    """Whether `Tensor` stands anywhere but as the first of two in `Float[Tensor, "rows columns"]`."""
    shaped = {
        id(node.slice.elts[0])
        for node in ast.walk(annotation)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2
        if isinstance(node.slice.elts[1], ast.Constant) and isinstance(node.slice.elts[1].value, str)
    }
    return any(
        isinstance(node, ast.Name) and node.id == "Tensor" and id(node) not in shaped for node in ast.walk(annotation)
    )


def _specification(path: Path) -> Path:
    """The place of a module's specification: the same room under the tests, and its own name."""
    place = next(place for place in SPECIFICATIONS if path.is_relative_to(ROOT / place))
    return ROOT / SPECIFICATIONS[place] / path.relative_to(ROOT / place).with_name(f"test_{path.name}")
