"""`dashq plugins`: list, check, and new."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from broken_strategies import LosesToRounding
from dashq import MissingPackageError, OutputError, Solver, UsageError, hookimpl, load_registry, registry
from dashq.testing import check_strategy
from dashq_cli.plugins import Kind, app


def invoke(*arguments: str | Path) -> Result:
    """Run a command; what the main program would print for the user is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def import_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BrokenPlugin:
    @hookimpl
    def dashq_solvers(self) -> list[type[Solver]]:
        return [LosesToRounding]


def test_list_shows_kind_name_parameters_and_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = [" ".join(line.split()) for line in invoke("list").stdout.splitlines()]
    start = lines.index("groupers")
    assert start < lines.index("contiguous Groups of `size` neighbouring columns.", start) < lines.index("routers")
    assert "dashq_plugins.groupers.contiguous · size=64 · uneven=error" in lines


def test_check_has_a_line_for_each_strategy_that_is_named_with_what_it_claims() -> None:
    result = invoke("check", "rtn", "channel")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["ok    solver rtn, never worse than minmax", "ok    grouper channel"]


def test_check_fails_when_one_strategy_breaks_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    with_broken = load_registry(BrokenPlugin())
    monkeypatch.setattr(registry, "load_registry", lambda: with_broken)
    result = invoke("check", "loses_to_rounding", "routed")
    assert result.exit_code == 1
    failure, success = result.stdout.splitlines()
    assert failure.startswith("FAIL  solver 'loses_to_rounding' must never have more weighted error")
    assert success == "ok    router routed"


def test_check_guesses_what_a_misspelt_name_was_meant_to_be() -> None:
    with pytest.raises(
        UsageError, match=r"no strategy named 'diagnal'\. Did you mean 'diagonal'\? Installed: blended,"
    ):
        invoke("check", "rtn", "diagnal")


def test_check_without_hypothesis_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("dashq.testing")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingPackageError, match=r"needs hypothesis: pip install 'dashq\[testing\]'"):
        invoke("check")


@pytest.mark.parametrize("kind", Kind)
def test_new_writes_a_plugin_that_keeps_its_contract(kind: Kind, tmp_path: Path) -> None:
    assert invoke("new", "my_own", "--kind", kind, "--folder", tmp_path).exit_code == 0
    registry = load_registry(import_module(tmp_path / "dashq-my_own" / "dashq_my_own.py"))
    [cls] = [classes["my_own"] for classes in vars(registry).values() if "my_own" in classes]
    assert cls.__name__ == f"MyOwn{kind.capitalize()}"
    check_strategy(cls)


def test_new_writes_nothing_but_what_a_package_needs(tmp_path: Path) -> None:
    invoke("new", "mine", "--kind", "router", "--folder", tmp_path)
    files = sorted(path.name for path in (tmp_path / "dashq-mine").iterdir())
    assert files == ["README.md", "dashq_mine.py", "pyproject.toml", "test_contract.py"]


def test_check_of_a_plugin_that_was_just_begun_says_that_it_must_be_installed(tmp_path: Path) -> None:
    invoke("new", "mine", "--kind", "router", "--folder", tmp_path)
    with pytest.raises(UsageError, match=r"no strategy named 'mine'.*installed first: pip install -e dashq-mine"):
        invoke("check", "mine")


@pytest.mark.parametrize("name", ["2bit", "my-solver", "Mine", "größe", "a__b", "_a", "a_", ""])
def test_new_refuses_what_cannot_be_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name!r} cannot name a plugin: it takes lower-case letters"):
        invoke("new", "--kind", "solver", "--folder", tmp_path, "--", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["diagonal", "irls", "native", "gguf"])
def test_new_refuses_the_name_of_a_strategy_or_plugin_that_is_installed(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is the name of an installed plugin; choose another"):
        invoke("new", name, "--kind", "solver", "--folder", tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_never_touches_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "dashq-mine").mkdir()
    with pytest.raises(OutputError, match="dashq-mine exists already"):
        invoke("new", "mine", "--kind", "solver", "--folder", tmp_path)
    assert not list((tmp_path / "dashq-mine").iterdir())
