"""Compose quantization strategies into a run, and open the results with transformers."""

from dashq.data import Curvature, Diagonal, Full, Grid, Grouping, Layer, Quantized
from dashq.errors import (
    CheckpointError,
    DashqError,
    OutputError,
    PlanError,
    PluginError,
    RecipeError,
    TextError,
)
from dashq.hooks import hookimpl
from dashq.integration import DashqConfig
from dashq.linear import DashqLinear
from dashq.pipeline import run
from dashq.plan import LayerPlan, make_plan
from dashq.recipe import Recipe, load_recipe
from dashq.registry import Registry, load_registry
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver

__all__ = [
    "CheckpointError",
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
    "OutputError",
    "PlanError",
    "PluginError",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Registry",
    "Router",
    "Serializer",
    "Solver",
    "TextError",
    "hookimpl",
    "load_recipe",
    "load_registry",
    "make_plan",
    "run",
]
