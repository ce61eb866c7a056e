"""A program opens the checkpoints of one format, and gives what it does not say to differ exactly."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq.programs import Opened, Program
from recipes import REGISTRY

PROGRAMS = [program for programs in REGISTRY.programs.values() for program in programs.values()]


def nothing(folder: Path, trust_remote_code: bool) -> Opened:
    return Opened()


def test_what_a_program_does_not_give_is_none_and_its_weights_are_exact_unless_it_says_otherwise() -> None:
    opened = Opened()
    assert (opened.weight, opened.logits, opened.rounded) == (None, None, None)
    assert (opened.tolerance, opened.logits_tolerance) == (0.0, 1e-3)
    assert opened.computes_in == opened.unpacks_to == torch.float32


@pytest.mark.parametrize("missing", ["name", "format", "open"])
def test_a_program_says_its_name_its_format_and_how_it_opens(missing: str) -> None:
    entries: dict[str, Any] = {"name": "reader", "format": "dashq", "open": nothing}
    program = Program(**entries)
    assert {field.name: getattr(program, field.name) for field in fields(program)} == entries
    with pytest.raises(TypeError, match=f"'{missing}'"):
        Program(**{name: value for name, value in entries.items() if name != missing})


@pytest.mark.parametrize(
    "value", [Opened(), Program(name="reader", format="dashq", open=nothing)], ids=["opened", "program"]
)
def test_neither_changes_once_it_is_made(value: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, None)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"{program.format}-{program.name}")
def test_an_installed_program_opens_an_installed_format(program: Program) -> None:
    assert program.format in REGISTRY.serializers
    assert callable(program.open)
