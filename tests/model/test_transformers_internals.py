"""One module of the core knows what transformers does not promise to keep."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashq.model import transformers_internals
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import build_recipe

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "dashq"
ADAPTER = CORE / "model" / "transformers_internals.py"
KERNEL = CORE / "runtime" / "int4.py"
CHAT = CORE / "calibration" / "chat_process.py"  # a process of its own, whose memory the adapter's torch would fill
# Attributes that are not documented, though nothing in their names says so.
UNDOCUMENTED = {"all_tied_weights_keys", "has_post_expert_norm", "is_transposed"}
# Of named tuples, torch's compiler, and the end of a process.
DOCUMENTED = {"_replace", "_fields", "_inductor", "_exit"}
# Of torch's operators, which only a kernel calls by name.
OPERATORS = {"_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"}
# Whoever brings a quantizer of his own is told to register it with these.
REGISTRATION = {
    "transformers.quantizers.auto",
    "transformers.quantizers.base",
    "transformers.utils.quantization_config",
}
PUBLIC = {"transformers", "transformers.utils"} | REGISTRATION


def test_no_other_module_imports_private_names() -> None:
    for path in CORE.rglob("*.py"):
        if path not in (ADAPTER, CHAT):
            nodes = ast.walk(ast.parse(path.read_text()))
            modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert {name for name in modules if name.split(".")[0] == "transformers"} <= PUBLIC, path


def attributes(module: ast.Module) -> Iterator[str]:
    """The attributes that a module asks objects for, by a dot or by a string."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (str(word.value) for word in node.args[1:] if isinstance(word, ast.Constant))


def own_names(module: ast.Module) -> set[str]:
    """The names that a module defines itself, attributes of its objects among them."""
    nodes = list(ast.walk(module))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return names | {
        node.target.id for node in nodes if isinstance(node, ast.AnnAssign) if isinstance(node.target, ast.Name)
    }


def test_no_other_module_asks_for_private_attributes_of_what_is_not_its_own() -> None:
    for path in [*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        if path != ADAPTER:
            module = ast.parse(path.read_text())
            private = {name for name in attributes(module) if name.startswith("_") and not name.endswith("__")}
            assert private - own_names(module) <= (DOCUMENTED | OPERATORS if path == KERNEL else DOCUMENTED), path
            assert UNDOCUMENTED.isdisjoint(attributes(module)), path


def test_the_adapter_asks_for_them() -> None:
    assert {"_apply_gate", *UNDOCUMENTED} <= set(attributes(ast.parse(ADAPTER.read_text())))


def test_each_part_lists_its_own_parameters_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[int] = []
    read: Any = vars(transformers_internals)["convert_and_load_state_dict_in_model"]

    def counting(part: Any, tensors: dict[str, Any], config: Any) -> Any:
        listed.append(len(part.state_dict()))
        return read(part, tensors, config)

    monkeypatch.setattr(transformers_internals, "convert_and_load_state_dict_in_model", counting)
    model = open_model(build_recipe(pico_model("llama", tmp_path / "model", num_hidden_layers=12), tmp_path / "out"))
    with model.outside():
        pass
    for _ in model.walk():
        pass
    assert listed == [2] + 12 * [9]  # with all listed each time it grows with the square of the number of blocks


def test_packages_that_transformers_lacks_for_packed_weights_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    assert not transformers_internals.can_unpack({"quant_method": "gptq", "bits": 4, "group_size": 64})
    assert transformers_internals.can_unpack({"quant_method": "metal", "bits": 4, "group_size": 64})
