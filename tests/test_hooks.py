"""There is a hook for each kind of strategy, for programs and targets, and a plugin implements those that it likes."""

import inspect
from collections.abc import Iterable
from typing import get_args, get_origin, get_type_hints

import pluggy
import pytest

from dashq import hooks
from dashq.programs import Program, Target
from dashq.strategies import KINDS

HOOKS = {name: hook for name, hook in vars(hooks).items() if name.startswith("dashq_")}


def manager() -> pluggy.PluginManager:
    plugins = pluggy.PluginManager(hooks.PROJECT)
    plugins.add_hookspecs(hooks)
    return plugins


def test_there_is_one_for_each_kind_of_strategy_for_programs_and_for_targets() -> None:
    answers = {name: get_type_hints(hook)["return"] for name, hook in HOOKS.items()}
    assert {get_origin(answer) for answer in answers.values()} == {Iterable}
    brought = {name: get_args(answer)[0] for name, answer in answers.items()}
    assert brought.pop("dashq_programs") is Program
    assert brought.pop("dashq_targets") is Target
    assert {name: get_args(classes) for name, classes in brought.items()} == {
        f"dashq_{kind}": (interface,) for kind, interface in KINDS.items()
    }


@pytest.mark.parametrize("name", HOOKS)
def test_each_takes_no_arguments_is_explained_and_brings_nothing_by_itself(name: str) -> None:
    assert not inspect.signature(HOOKS[name]).parameters
    assert inspect.getdoc(HOOKS[name])
    assert list(HOOKS[name]()) == []
    assert getattr(manager().hook, name)() == []


@pytest.mark.parametrize("name", HOOKS)
def test_a_plugin_may_implement_one_alone(name: str) -> None:
    plugin = type("Plugin", (), {name: staticmethod(hooks.hookimpl(lambda: ["answer"]))})
    plugins = manager()
    plugins.register(plugin)
    plugins.check_pending()
    answers = {other: getattr(plugins.hook, other)() for other in HOOKS}
    assert answers == {other: [["answer"]] if other == name else [] for other in HOOKS}


def test_a_function_without_the_mark_is_no_hook() -> None:
    plugins = manager()
    plugins.register(type("Plugin", (), {"dashq_solvers": staticmethod(lambda: ["answer"])}))
    assert plugins.hook.dashq_solvers() == []


def test_a_hook_that_wants_arguments_is_refused() -> None:
    plugin = type("Plugin", (), {"dashq_solvers": staticmethod(hooks.hookimpl(lambda registry: [registry]))})
    with pytest.raises(pluggy.PluginValidationError, match="registry"):
        manager().register(plugin)
