"""Find plugins, check them, and index their strategies by name."""

import functools
import importlib.metadata
import inspect
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy

from dashq import hooks
from dashq.errors import PluginError
from dashq.programs import Program, Target
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner

S = TypeVar("S", bound=Strategy)


@dataclass(frozen=True)
class Registry:
    """The strategies of each kind by name, by format the programs that open it by name, and targets by name."""

    estimators: Mapping[str, type[Estimator]]
    solvers: Mapping[str, type[Solver]]
    groupers: Mapping[str, type[Grouper]]
    routers: Mapping[str, type[Router]]
    serializers: Mapping[str, type[Serializer]]
    tuners: Mapping[str, type[Tuner]]
    programs: Mapping[str, Mapping[str, Program]]
    targets: Mapping[str, Target]


def load_registry(*extra: object) -> Registry:
    """Load every installed plugin, and `extra` plugin objects: modules or instances that implement hooks.

    Raises `PluginError` for a plugin that does not load or breaks a rule, and where two bring strategies of one name.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    try:
        for name, plugin in [*_installed(), *((repr(plugin), plugin) for plugin in extra)]:
            manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(sorted(name for name in vars(hooks) if name.startswith("dashq_")))
        raise PluginError(f"{error}. The hooks are: {known}") from error
    return Registry(
        estimators=_index(manager.hook.dashq_estimators, Estimator),
        solvers=_index(manager.hook.dashq_solvers, Solver),
        groupers=_index(manager.hook.dashq_groupers, Grouper),
        routers=_index(manager.hook.dashq_routers, Router),
        serializers=_index(manager.hook.dashq_serializers, Serializer),
        tuners=_index(manager.hook.dashq_tuners, Tuner),
        programs=_programs(manager.hook.dashq_programs),
        targets=_targets(manager.hook.dashq_targets),
    )


@functools.cache
def installed_registry() -> Registry:
    """The registry of the installed plugins alone, loaded at the first call and kept for the rest of the process.

    It serves whoever names no registry, such as transformers when it opens a checkpoint.
    """
    return load_registry()


def _installed() -> Iterable[tuple[str, object]]:
    # pluggy's own loader silently skips a second distribution that uses the same entry-point name.
    disabled = [name.strip() for name in os.environ.get("DASHQ_DISABLE_PLUGINS", "").split(",")]
    providers: dict[str, str] = {}
    for entry in sorted(importlib.metadata.entry_points(group=hooks.PROJECT)):
        provider = entry.dist.name if entry.dist else "?"
        if entry.name in disabled:
            continue
        if entry.name in providers:
            raise PluginError(
                f"two packages bring a plugin named {entry.name!r}: {providers[entry.name]} and {provider}. "
                "Uninstall one of them."
            )
        providers[entry.name] = provider
        try:
            yield entry.name, entry.load()
        except Exception as error:
            raise PluginError(
                f"plugin {entry.name!r} from {provider} does not load: {type(error).__name__}: {error}. "
                f"To go on without it, set DASHQ_DISABLE_PLUGINS={entry.name}"
            ) from error


def _index(hook: pluggy.HookCaller, kind: type[S]) -> Mapping[str, type[S]]:
    """The one place where pluggy's untyped results become typed."""
    strategies: dict[str, type[S]] = {}
    for cls in itertools.chain.from_iterable(map(_ask, hook.get_hookimpls())):
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise PluginError(f"{cls!r} is not a subclass of {kind.__name__}")
        if inspect.isabstract(cls) or not hasattr(cls, "name"):
            raise PluginError(f"{path_of(cls)} is unfinished: it needs a `name` and every abstract method")
        if cls.name in strategies:
            both = " and ".join(sorted(map(path_of, (strategies[cls.name], cls))))
            raise PluginError(f"two plugins bring a {kind.__name__} named {cls.name!r}: {both}")
        strategies[cls.name] = cls
    return dict(sorted(strategies.items()))


def _programs(hook: pluggy.HookCaller) -> Mapping[str, Mapping[str, Program]]:
    programs: dict[str, dict[str, Program]] = defaultdict(dict)
    for answer in hook.get_hookimpls():
        for program in _ask(answer):
            if not isinstance(program, Program):
                raise PluginError(f"plugin {answer.plugin_name!r} brings {program!r}, which is no `Program`")
            if program.name in programs[program.format]:
                raise PluginError(
                    f"two plugins, the second is {answer.plugin_name!r}, bring a program named {program.name!r} "
                    f"for the format {program.format!r}"
                )
            programs[program.format][program.name] = program
    return {name: dict(sorted(own.items())) for name, own in sorted(programs.items())}


def _targets(hook: pluggy.HookCaller) -> Mapping[str, Target]:
    targets: dict[str, Target] = {}
    for answer in hook.get_hookimpls():
        for target in _ask(answer):
            if not isinstance(target, Target):
                raise PluginError(f"plugin {answer.plugin_name!r} brings {target!r}, which is no `Target`")
            if target.name in targets:
                raise PluginError(
                    f"two plugins, the second is {answer.plugin_name!r}, bring a target named {target.name!r}"
                )
            targets[target.name] = target
    return dict(sorted(targets.items()))


def _ask(answer: pluggy.HookImpl) -> list[Any]:
    # One plugin at a time: all at once, pluggy would not say who failed, and would pass over a forgotten `return`.
    try:
        classes: Any = answer.function()
        return list(classes)
    except Exception as error:
        raise PluginError(
            f"plugin {answer.plugin_name!r} fails in {answer.function.__name__}: {type(error).__name__}: {error}. "
            f"To go on without it, set DASHQ_DISABLE_PLUGINS={answer.plugin_name}"
        ) from error


def path_of(cls: type) -> str:
    """The full name of a class, as `module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"
