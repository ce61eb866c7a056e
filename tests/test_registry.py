"""Plugins are found, checked and indexed by name, and a broken one says how to go on without it."""

import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dashq import (
    CheckpointError,
    Curvature,
    Grid,
    Grouping,
    Opened,
    PluginError,
    Program,
    Quantized,
    Solver,
    Target,
    hookimpl,
    load_registry,
    run,
)
from dashq.registry import installed_registry, path_of
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.convert import convert
from dashq.results.verify import verify
from dashq_plugins.formats.native import NativeSerializer
from pico import pico_model
from recipes import build_recipe

Installer = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Installs a distribution with one module and one entry point, as pip would lay it out on disk."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def install(distribution: str, entry: str, module: str, code: str = "") -> None:
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[dashq]\n{entry} = {module}\n")
        (tmp_path / f"{module}.py").write_text(code)
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def plugin(**hooks: Callable[..., Any]) -> object:
    """A plugin object, as a module with these functions would be."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


class LazySolver(Solver):
    name = "lazy"

    def solve(self, weight: Any, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        raise NotImplementedError


class OtherLazySolver(LazySolver):
    pass


class NamelessSolver(Solver):
    def solve(self, weight: Any, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        raise NotImplementedError


class SolverWithoutSolve(Solver):
    name = "empty"


def test_the_default_strategies_come_in_through_entry_points_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry()
    assert {"diagonal"} <= registry.estimators.keys()
    assert {"rtn", "irls"} <= registry.solvers.keys()
    assert {"contiguous", "channel"} <= registry.groupers.keys()
    assert {"routed", "every_expert"} <= registry.routers.keys()
    assert {"dashq"} <= registry.serializers.keys()
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="dashq")}
    monkeypatch.setenv("DASHQ_DISABLE_PLUGINS", ",".join(plugins))
    assert not any(vars(load_registry()).values())


def test_a_plugin_object_adds_its_strategies_to_the_installed_ones() -> None:
    solvers = load_registry(plugin(dashq_solvers=lambda: [LazySolver])).solvers
    assert solvers == {**load_registry().solvers, "lazy": LazySolver}


class OwnSerializer(NativeSerializer):
    """A format that nobody has installed."""

    name = "own"


def test_a_plugin_that_was_given_by_hand_serves_from_the_run_to_what_is_made_of_its_result(tmp_path: Path) -> None:
    registry = load_registry(plugin(dashq_serializers=lambda: [OwnSerializer]))
    model = pico_model("llama", tmp_path / "model")
    out = run(build_recipe(model, tmp_path / "out", registry, serializer="own"))
    assert all(check.passed for check in verify(out, registry=registry))
    converted = convert(out, NativeSerializer(), tmp_path / "converted", registry=registry)
    own, native = open_network(out, torch.float32, registry), open_network(converted, torch.float32)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(own(tokens).logits, native(tokens).logits)
    own.save_pretrained(tmp_path / "saved")
    assert open_checkpoint(out, registry).serializer == OwnSerializer()
    assert '"name": "own"' in (tmp_path / "saved" / "config.json").read_text()
    with pytest.raises(CheckpointError, match="packed by the serializer 'own', which is not installed"):
        open_checkpoint(out)


def test_the_installed_plugins_are_loaded_once() -> None:
    assert installed_registry() is installed_registry()
    assert installed_registry() == load_registry()


def test_an_installed_plugin_adds_its_strategies(install: Installer) -> None:
    code = """
        from dashq import hookimpl
        from dashq_plugins.solvers.rtn import RoundToNearestSolver

        class PlainSolver(RoundToNearestSolver):
            name = "plain"

        @hookimpl
        def dashq_solvers():
            return [PlainSolver]
    """
    install("plain-package", "plain", "plain_module", textwrap.dedent(code))
    assert path_of(load_registry().solvers["plain"]) == "plain_module.PlainSolver"


def test_one_name_for_two_strategies_names_both_classes() -> None:
    two = plugin(dashq_solvers=lambda: [LazySolver]), plugin(dashq_solvers=lambda: [OtherLazySolver])
    with pytest.raises(PluginError) as error:
        load_registry(*two)
    assert "two plugins bring a Solver named 'lazy'" in str(error.value)
    assert path_of(LazySolver) in str(error.value)
    assert path_of(OtherLazySolver) in str(error.value)


@pytest.mark.parametrize(
    ("hooks", "wrong"),
    [
        ({"dashq_solver": lambda: [LazySolver]}, "dashq_solver'"),
        ({"dashq_solvers": lambda config: [LazySolver]}, "config"),
    ],
    ids=["misspelt", "with an argument"],
)
def test_a_hook_that_is_none_of_ours_is_an_error(hooks: dict[str, Any], wrong: str) -> None:
    with pytest.raises(PluginError, match=wrong) as error:
        load_registry(plugin(**hooks))
    assert "dashq_estimators, dashq_groupers, dashq_programs, dashq_routers, dashq_serializers, dashq_solvers" in str(
        error.value
    )


def program(name: str) -> Program:
    return Program(name=name, format="mlx", open=lambda folder, trust_remote_code: Opened())


def test_a_plugin_brings_programs_for_a_format_of_another() -> None:
    programs = load_registry(plugin(dashq_programs=lambda: [program("abacus")])).programs
    assert list(programs["mlx"]) == ["abacus", "mlx", "mlx-lm"]


@pytest.mark.parametrize(
    ("brought", "message"),
    [
        (int, "brings <class 'int'>, which is no `Program`"),
        (program("mlx-lm"), "bring a program named 'mlx-lm' for the format 'mlx'"),
    ],
)
def test_a_program_that_is_none_or_twice_there_is_refused(brought: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_registry(plugin(dashq_programs=lambda: [brought]))


def target(name: str) -> Target:
    return Target(name=name, recipe=lambda wish: "", suits=lambda serializer: False, command="run {output}")


def test_a_plugin_brings_targets() -> None:
    assert "abacus" in load_registry(plugin(dashq_targets=lambda: [target("abacus")])).targets


@pytest.mark.parametrize(
    ("brought", "message"),
    [
        (int, "brings <class 'int'>, which is no `Target`"),
        (target("mlx"), "bring a target named 'mlx'"),
    ],
)
def test_a_target_that_is_none_or_twice_there_is_refused(brought: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_registry(plugin(dashq_targets=lambda: [brought]))


@pytest.mark.parametrize(
    ("brought", "message"),
    [
        (int, "<class 'int'> is not a subclass of Solver"),
        (LazySolver(), "is not a subclass of Solver"),
        (NamelessSolver, "NamelessSolver is unfinished: it needs a `name`"),
        (SolverWithoutSolve, "SolverWithoutSolve is unfinished: .* every abstract method"),
    ],
    ids=["another class", "an instance", "no name", "no solve"],
)
def test_what_is_no_finished_strategy_is_refused(brought: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_registry(plugin(dashq_solvers=lambda: [brought]))


def test_one_plugin_name_in_two_packages_names_both(install: Installer) -> None:
    install("first-package", "twin", "first_twin")
    install("second-package", "twin", "second_twin")
    with pytest.raises(PluginError, match="two packages bring a plugin named 'twin': first-package and second-package"):
        load_registry()


def test_a_plugin_that_does_not_import_says_how_to_go_on(install: Installer, monkeypatch: pytest.MonkeyPatch) -> None:
    install("broken-package", "broken", "broken_module", "import no_such_module_at_all")
    with pytest.raises(PluginError, match=r"plugin 'broken' from broken-package .*no_such_module_at_all") as error:
        load_registry()
    assert "DASHQ_DISABLE_PLUGINS=broken" in str(error.value)
    monkeypatch.setenv("DASHQ_DISABLE_PLUGINS", "irls, broken")
    assert "irls" not in load_registry().solvers


@pytest.mark.parametrize(
    ("hook", "failure"),
    [
        ("def dashq_solvers():\n    return [1 // 0]", "ZeroDivisionError"),
        ("def dashq_solvers():\n    pass  # no return", "TypeError"),
    ],
)
def test_a_hook_that_fails_names_its_plugin(install: Installer, hook: str, failure: str) -> None:
    install("failing-package", "failing", "failing_module", f"import dashq\n\n@dashq.hookimpl\n{hook}\n")
    with pytest.raises(PluginError, match=rf"plugin 'failing' fails in dashq_solvers: {failure}") as error:
        load_registry()
    assert "DASHQ_DISABLE_PLUGINS=failing" in str(error.value)
