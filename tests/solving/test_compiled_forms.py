"""Compiled forms stay on disk: a later process loads them, and only for arguments that they are right for."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from dashq import Grid
from dashq.solving import compiled_forms
from dashq.solving.compiled import OPTIONS
from dashq.solving.compiled_forms import CompiledForms
from dashq.solving.stored_values import Levels, store
from tensors import noise

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not hasattr(torch.compiler, "load_compiled_function"), reason="torch cannot keep forms"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SOURCE = """
from dashq.solving.stored_values import store

def stored(scale, offset, levels):
    return store(scale, offset, levels)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled forms; torch's own, of what it compiles to, is as it was."""
    from torch._inductor.runtime import cache_dir_utils

    monkeypatch.setattr(cache_dir_utils, "cache_dir", lambda: str(tmp_path / "kept"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return tmp_path / "kept" / "dashq"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function of a package: what tests check shapes in cannot be saved."""
    package = tmp_path / "arithmetic_of_an_author"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    compiled_forms._source.cache_clear()
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    function: Callable[..., Any] = importlib.import_module(package.name).stored
    return function


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def example(bits: int, rows: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Levels]:
    values = noise(bits, rows)
    return values.abs(), values, Levels.of(Grid(bits=bits, dtype=dtype), values)


def cannot_compile(*arguments: object, **options: object) -> Callable[..., Any]:
    raise AssertionError("compiled anew")


def test_a_later_process_loads_what_an_earlier_one_compiled(
    folder: Path, stored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CompiledForms(stored, OPTIONS)
    assert files(folder) == []
    expected = first.fitting(example(2, 40), {})(*example(2, 40))
    assert files(folder) == ["arithmetic_of_an_author.stored.0"]
    later = CompiledForms(stored, OPTIONS)
    monkeypatch.setattr(torch, "compile", cannot_compile)
    for one, other in zip(later.fitting(example(2, 40), {})(*example(2, 40)), expected, strict=True):
        assert one.equal(other)
    for one, other in zip(later.fitting(example(3, 7), {})(*example(3, 7)), store(*example(3, 7)), strict=True):
        assert one.equal(other)


def test_a_form_serves_no_arguments_whose_constants_differ(folder: Path, stored: Callable[..., Any]) -> None:
    CompiledForms(stored, OPTIONS).fitting(example(2, 40), {})
    later = CompiledForms(stored, OPTIONS)
    bfloat16 = example(2, 40, torch.bfloat16)
    scale, offset = later.fitting(bfloat16, {})(*bfloat16)
    assert scale.equal(scale.bfloat16().float())
    assert offset.equal(offset.bfloat16().float())
    assert len(files(folder)) == 2
    symmetric = (*bfloat16[:2], bfloat16[2]._replace(zero="symmetric"))
    _, offset = later.fitting(symmetric, {})(*symmetric)
    assert offset.equal(-scale * 2)
    assert len(files(folder)) == 3


def test_forms_of_another_source_are_left_aside(folder: Path, stored: Callable[..., Any], tmp_path: Path) -> None:
    CompiledForms(stored, OPTIONS).fitting(example(2, 40), {})
    (tmp_path / "arithmetic_of_an_author" / "constants.py").write_text("HALF = 0.5")
    compiled_forms._source.cache_clear()
    CompiledForms(stored, OPTIONS).fitting(example(2, 40), {})
    assert len({file.parent for file in folder.rglob("arithmetic*")}) == 2


def test_a_damaged_file_is_compiled_anew(folder: Path, stored: Callable[..., Any]) -> None:
    CompiledForms(stored, OPTIONS).fitting(example(2, 40), {})
    (file,) = (file for file in folder.rglob("*") if file.is_file())
    file.write_bytes(file.read_bytes()[:100])
    CompiledForms(stored, OPTIONS).fitting(example(2, 40), {})
    assert len(files(folder)) == 2


def test_a_folder_that_cannot_be_written_to_costs_only_time(folder: Path, stored: Callable[..., Any]) -> None:
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    forms = CompiledForms(stored, OPTIONS)
    for one, other in zip(forms.fitting(example(2, 40), {})(*example(2, 40)), store(*example(2, 40)), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("function", [lambda x: 2 * x, Path.exists])
def test_functions_that_their_name_does_not_determine_are_not_kept(
    folder: Path, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert CompiledForms(function, OPTIONS).fitting((torch.ones(2),), {}) is function
    assert files(folder) == []
