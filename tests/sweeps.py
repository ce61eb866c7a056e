"""Sweeps for tests: a small recipe with two values for each of two entries."""

from pathlib import Path

from recipes import small_recipe, write_recipe

VARIED = ("--vary", "scheme.bits=2,3", "--vary", "scheme.solver=rtn,irls")
NAMES = [f"bits-{bits}_solver-{solver}" for bits in (2, 3) for solver in ("rtn", "irls")]


def recipe_in(folder: Path, model: Path) -> Path:
    """A recipe file in a folder, whose output lies beside it."""
    return write_recipe(folder / "recipe.yaml", small_recipe(model, folder / "out"))
