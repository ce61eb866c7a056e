"""One module of the core knows what transformers does not promise to keep."""

import ast
from pathlib import Path

CORE = Path(__file__).parents[2] / "core" / "dashq"
PUBLIC = {"transformers", "transformers.quantizers", "transformers.utils", "transformers.utils.quantization_config"}


def test_no_other_module_imports_private_names() -> None:
    for path in CORE.rglob("*.py"):
        if path.name != "transformers_internals.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert {name for name in modules if name.split(".")[0] == "transformers"} <= PUBLIC, path
