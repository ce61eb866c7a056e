"""What is imported: by commands that should answer at once, and by transformers to open results."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"transformers", "datasets", "accelerate", "scipy", "sympy", "torch._dynamo"}
BAD_RECIPE = "model: somewhere\noutput: out\nscheme: {bits: 2, solver: no_such_solver}\n"
COMMAND = """
import atexit, sys
modules = sys.argv.pop(1)
atexit.register(lambda: open(modules, "w").write("\\n".join(sys.modules)))
from dashq_cli import main
main()
"""


def imported(folder: Path, *arguments: str) -> set[str]:
    """The modules that a process of `dashq` with these arguments has imported when it ends."""
    modules = folder / "modules.txt"
    subprocess.run([sys.executable, "-c", COMMAND, str(modules), *arguments], capture_output=True, check=False)
    return set(modules.read_text().split("\n"))


@pytest.mark.parametrize("arguments", [["--version"], ["plugins", "new", "my_solver", "--kind", "solver", "--folder"]])
def test_without_torch_the_version_is_told_and_a_plugin_begun(arguments: list[str], tmp_path: Path) -> None:
    modules = imported(tmp_path, *arguments, *([str(tmp_path)] if "new" in arguments else []))
    assert "dashq_cli" in modules
    assert not modules & (HEAVY | {"torch"})


@pytest.mark.parametrize("arguments", [["plugins", "list"], ["formats"]])
def test_strategies_are_listed_without_transformers(arguments: list[str], tmp_path: Path) -> None:
    modules = imported(tmp_path, *arguments)
    assert "dashq_plugins.formats.gguf.serializer" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("command", ["plan", "run", "analyze"])
def test_a_bad_recipe_is_refused_before_transformers_is_imported(command: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(BAD_RECIPE)
    modules = imported(tmp_path, command, str(recipe))
    assert "dashq.recipe.recipe" in modules
    assert not modules & HEAVY


IS_REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["dashq"].__name__ == "DashqConfig"
assert AUTO_QUANTIZER_MAPPING["dashq"].__name__ == "DashqQuantizer"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import dashq",
        "import dashq; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import dashq",
        "from dashq import DashqConfig",
    ],
)
def test_transformers_knows_results_whichever_is_imported_first(imports: str) -> None:
    subprocess.run([sys.executable, "-c", f"{imports}\n{IS_REGISTERED}"], check=True)


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    import dashq

    assert set(dashq.__all__) <= set(dir(dashq))
    for name in dashq.__all__:
        assert getattr(dashq, name).__module__.startswith(("dashq.", "collections.", "types", "typing", "pluggy")), name


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    import dashq

    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(dashq, "no_such_name")  # noqa: B009 - type checkers know that it is none
