"""Compose quantization strategies into a run, and open the results with transformers."""

from dashq.data import Curvature, Diagonal, Full, Grid, Grouping, Layer, Quantized, StoredLayer, SuperBlocks, Zero
from dashq.errors import (
    CheckpointError,
    DashqError,
    MissingPackageError,
    OutputError,
    PlanError,
    PluginError,
    RecipeError,
    TextError,
    UsageError,
)
from dashq.hooks import hookimpl
from dashq.pipeline import run
from dashq.programs import Contents, Opened, Program
from dashq.recipe.plan import LayerPlan, make_plan
from dashq.recipe.recipe import Recipe, load_recipe
from dashq.registry import Registry, load_registry
from dashq.runtime.linear import DashqLinear
from dashq.runtime.quantizer import DashqConfig
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver

__all__ = [
    "CheckpointError",
    "Contents",
    "Curvature",
    "DashqConfig",
    "DashqError",
    "DashqLinear",
    "Diagonal",
    "Estimator",
    "Full",
    "Grid",
    "Grouper",
    "Grouping",
    "Layer",
    "LayerPlan",
    "MissingPackageError",
    "Opened",
    "OutputError",
    "PlanError",
    "PluginError",
    "Program",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Registry",
    "Router",
    "Serializer",
    "Solver",
    "StoredLayer",
    "SuperBlocks",
    "TextError",
    "UsageError",
    "Zero",
    "hookimpl",
    "load_recipe",
    "load_registry",
    "make_plan",
    "run",
]
