"""What tests of graphics processors have in common: values that move, solvers with the grids they fit, walks."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashq import Full, Grid, Grouping, PlanError, Recipe, Serializer, Solver
from dashq.data import Zero
from dashq_plugins.formats.gguf.blocks import TYPES, named
from pico import pico_model
from pretend_device import DEVICE
from recipes import FEEDBACK, REGISTRY, TEXT, build_recipe, small_scheme
from tensors import noise

CPU = torch.device("cpu")
IDS = torch.arange(20)[None]


def moved(value: Any, device: torch.device = DEVICE) -> Any:
    """The same value with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return {key: moved(part, device) for key, part in value.items()} if isinstance(value, dict) else value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or is_dataclass(value):
        for part in value.values() if isinstance(value, dict) else vars(value).values():
            yield from tensors(part)


def home(value: Any) -> Any:
    """The value on the CPU, all of which was on the device."""
    assert all(tensor.device == DEVICE for tensor in tensors(value))
    return moved(value, CPU)


def full(columns: int) -> Full:
    x = noise(0, 30, columns)
    return Full(x.T @ x / 30)


ZEROS: tuple[Zero, ...] = ("real", "integer", "symmetric")
GRIDS = [
    *(Grid(bits=2, dtype=torch.float16, zero=zero) for zero in ZEROS),
    Grid(bits=2, dtype=torch.bfloat16, zero="symmetric", negative_scales=True),
    Grid(bits=2, dtype=torch.float16, stores_zero=True),
    *(block_type.grid for block_type in TYPES.values() if block_type.grid.super_blocks),
    *(named(name).grid for name in ("IQ2_S", "IQ3_S", "IQ4_XS", "IQ4_NL")),
]


def grouping_of(grid: Grid, order: Tensor | None = None) -> Grouping:
    """Groups as the grid has them, or such that the last is shorter than the others."""
    if grid.super_blocks:
        return Grouping(columns=grid.super_blocks.columns, size=grid.super_blocks.size)
    return Grouping(columns=70, size=32, order=order)


def fits(solver: Solver, grid: Grid) -> bool:
    try:
        solver.check(grouping_of(grid).size, grid)
    except PlanError:
        return False
    return solver.supports_super_blocks == bool(grid.super_blocks)


SOLVERS = [
    *(solver() for solver in REGISTRY.solvers.values()),
    REGISTRY.solvers["irls"].model_validate({"p": 1.0, "ridge": 0.01}),
]
PAIRS = [(solver, grid) for solver in SOLVERS for grid in GRIDS if fits(solver, grid)]


def grids_of(serializer: Serializer) -> Iterator[Grid]:
    for bits in (2, 3, 4, 5):
        with suppress(PlanError):
            yield serializer.grid(bits)


FORMATS = [
    (serializer, grid)
    for cls in REGISTRY.serializers.values()
    for serializer in [cls()]
    for grid in grids_of(serializer)
]


def recipes(family: str, folder: Path, scheme: dict[str, Any], **calibration: Any) -> list[Recipe]:
    """The same recipe for the CPU and for the device."""
    pico_model(family, folder / "model", num_hidden_layers=2)
    changes: dict[str, Any] = {"calibration": TEXT | calibration, "scheme": small_scheme(**scheme)}
    return [
        build_recipe(folder / "model", folder / device, device=device, dtype="float32", **changes)
        for device in ("cpu", "cuda")
    ]


WALKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "in one shot": ("llama", {}, {}),
    "in sequence, corrected": (
        "llama",
        {"solver": FEEDBACK, "estimator": "hybrid"},
        {"propagate": "sequential", "error_correction": 0.5},
    ),
    "a mixture": ("mixtral", {"router": "gated"}, {"propagate": "quantized"}),
    "dispatched experts": ("llama4", {"router": "routed", "solver": "rtn"}, {}),
}
