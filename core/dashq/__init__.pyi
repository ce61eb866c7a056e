from .data import Curvature, Diagonal, Full, Grid, Grouping, Layer, Quantized, StoredLayer, SuperBlocks, Zero
from .errors import (
    CheckpointError,
    DashqError,
    OutputError,
    PlanError,
    PluginError,
    RecipeError,
    TextError,
)
from .hooks import hookimpl
from .pipeline import run
from .programs import Contents, Opened, Program
from .recipe.plan import LayerPlan, make_plan
from .recipe.recipe import Recipe, load_recipe
from .registry import Registry, load_registry
from .runtime.linear import DashqLinear
from .runtime.quantizer import DashqConfig
from .strategies import Estimator, Grouper, Router, Serializer, Solver

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
    "Zero",
    "hookimpl",
    "load_recipe",
    "load_registry",
    "make_plan",
    "run",
]
