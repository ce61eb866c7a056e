"""One module of the core knows what transformers does not promise to keep."""

import ast
from pathlib import Path

CORE = Path(__file__).parents[2] / "core" / "dashq"
# Whoever brings a quantizer of his own is told to register it with these.
REGISTRATION = {
    "transformers.quantizers.auto",
    "transformers.quantizers.base",
    "transformers.utils.quantization_config",
}
PUBLIC = {"transformers", "transformers.utils"} | REGISTRATION


def test_no_other_module_imports_private_names() -> None:
    for path in CORE.rglob("*.py"):
        if path.name != "transformers_internals.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert {name for name in modules if name.split(".")[0] == "transformers"} <= PUBLIC, path
