import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jaxtyping
import pytest

from shapes import jaxtyped_once

if TYPE_CHECKING:
    from family_results import FamilyResults
    from format_results import FormatResults

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
jaxtyping.jaxtyped = jaxtyped_once  # type: ignore[assignment]  # before dashq is imported

hypothesis.settings.register_profile("dashq", deadline=None, derandomize=True)  # first torch calls are slow
hypothesis.settings.load_profile("dashq")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same one in all processes that share the tests of a session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def arithmetic_as_written() -> None:
    """Compiling a solver takes longer than all layers that tests solve: tests of compiled arithmetic ask for it."""
    from dashq.solving import compiled  # later than the shape checks are there

    compiled.COMPILE_FROM = 1 << 62


@pytest.fixture(scope="session", autouse=True)
def runs_without_a_sentence() -> None:
    """The words of both models behind a prompt take as long as all layers that tests solve: tests of them ask for them.

    The results of all families end with them.
    """
    from dashq.measuring import continuation

    continuation.LARGEST = 0


@pytest.fixture
def sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with a sentence, as they do outside of tests."""
    monkeypatch.setattr("dashq.measuring.continuation.LARGEST", 2e9)


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
