"""Every promise of the page on reliability names tests that hold it, and these exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]


def test_every_promise_names_a_test() -> None:
    assert ROWS
    assert not [row for row in ROWS if not re.search(r"`test_\w+`", row.rpartition(" | ")[2])]


def test_every_test_that_is_named_exists() -> None:
    modules = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "tests").rglob("test_*.py")]
    functions = {node.name for module in modules for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= functions
