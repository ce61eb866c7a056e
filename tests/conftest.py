import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, no_type_check

import hypothesis
import jaxtyping
import pytest

if TYPE_CHECKING:
    from family_results import FamilyResults
    from format_results import FormatResults

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

hypothesis.settings.register_profile("dashq", deadline=None, derandomize=True)  # first torch calls are slow
hypothesis.settings.load_profile("dashq")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same one in all processes that share the tests of a session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def families(shared: Path) -> "FamilyResults":
    """A model of every family and its result, written when a test first asks for them."""
    from family_results import FamilyResults  # later than the environment is set

    return FamilyResults(shared / "families")


@pytest.fixture(scope="session")
def model(families: "FamilyResults") -> Path:
    """A pico Llama, which no test may change."""
    return families.model("llama")


@pytest.fixture(scope="session")
def result(families: "FamilyResults") -> Path:
    """The quantized pico Llama, which no test may change."""
    return families.result("llama")


@pytest.fixture(scope="session")
def results(shared: Path) -> "FormatResults":
    """One small model in every format, each quantized when a test first asks for it."""
    from format_results import FormatResults  # later than the environment is set

    return FormatResults(shared / "formats")


@pytest.fixture(scope="session")
def wide_model(results: "FormatResults") -> Path:
    """The model that lies in every format."""
    return results.model


@pytest.fixture(autouse=True)
def _shapes_are_not_checked_in_compiled_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler cannot trace the shape checks, so that they are off while it compiles or runs a kernel.

    What runs as written is checked in full: the same functions, called on small layers.
    """
    from dashq.solving.compiled import Compilable

    compiled = Compilable.compiled

    def unchecked(self: Compilable[..., Any], *args: Any, **kwargs: Any) -> Any:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return compiled(self, *args, **kwargs)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    monkeypatch.setattr(Compilable, "compiled", unchecked)


_seen: set[str] = set()  # modules


@pytest.fixture(autouse=True)
def _functions_without_tensors_are_not_checked() -> None:
    """Shapes are checked in all calls of functions that take or return tensors; mypy is enough for the others.

    The checks of those, which are half of the calls, would take an eighth of the time of such tests as run recipes.
    """
    for name in sys.modules.keys() - _seen:
        if name.startswith(("dashq.", "dashq_plugins.")):
            for function in _functions(sys.modules[name]):
                if not any("jaxtyping" in repr(annotation) for annotation in function.__annotations__.values()):
                    no_type_check(function)
    _seen.update(sys.modules)


def _functions(module: ModuleType) -> Iterator[Callable[..., Any]]:
    """The functions and methods that a module defines and the checks are put around; without these."""
    for value in [*vars(module).values()]:
        for member in vars(value).values() if inspect.isclass(value) else [value]:
            if isinstance(member, property):
                member = member.fget
            elif isinstance(member, functools.cached_property):
                member = member.func
            elif isinstance(member, classmethod | staticmethod):
                member = member.__func__
            inner = inspect.unwrap(member)
            # Others are left as they are: what is marked has no type hints to ask for.
            if inspect.isfunction(inner) and inner is not member and inner.__module__ == module.__name__:
                yield inner
