"""The ready recipes load, and can be run on a model of their family, however small."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import target_recipes
from dashq import load_recipe
from dashq.quantizing.opening import open_model, plan_model
from dashq.starting import starting_command
from dashq_plugins.targets import GPTQ, MLX, Format
from pico import WIDE, pico_model
from recipes import REGISTRY

# Their super-blocks do not fit into all layers.
NARROW_LAYERS = {("llama.cpp", "gemma3.yaml"), ("ollama", "gemma3.yaml")}
RECIPES = Path(__file__).parents[2] / "recipes"
READY = target_recipes.target_recipes(RECIPES)
NARROW = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
# A pico model for each family whose layers fit into super-blocks where those of the real model do.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", WIDE),
    "qwen3": ("qwen3", WIDE | {"head_dim": 64}),
    "gemma3": ("gemma3", WIDE | NARROW | {"query_pre_attn_scalar": 64}),
    "mistral": ("mistral", WIDE),
    "phi4": ("phi3", WIDE),
    "qwen3_moe": ("qwen3_moe", WIDE | {"moe_intermediate_size": 256, "head_dim": 64}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: pico_model(family, folder / name, torch.float16, max_position_embeddings=1024, **sizes)
        for name, (family, sizes) in MODELS.items()
    }


def test_there_is_one_for_every_program_and_family_that_go_together() -> None:
    assert target_recipes.BITS.keys() == REGISTRY.targets.keys()
    assert target_recipes.FAMILIES.keys() == MODELS.keys()
    assert set(RECIPES.glob("*/*.yaml")) == READY.keys()
    assert len(READY) == 34


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_can_be_run_on_a_model_of_its_family(path: Path, models: dict[str, Path], tmp_path: Path) -> None:
    settings = [f"model={models[path.stem]}", f"output={tmp_path / 'out'}", "calibration.dataset=pydoc"]
    recipe = load_recipe(path, REGISTRY, settings)
    plans = plan_model(recipe, open_model(recipe))
    bits = target_recipes.BITS[path.parent.name]
    inside = {plan.grid.bits for plan in plans if plan.layer.role == "linear"}
    outside = {plan.grid.bits for plan in plans if plan.layer.role != "linear"}
    assert outside <= {5, 6}
    assert bool(outside) == (path.parent.name not in ("transformers", "vllm"))
    assert inside == ({bits, 4} if path.parts[-2:] in NARROW_LAYERS else {bits})
    assert starting_command(recipe) == REGISTRY.targets[path.parent.name].command


@pytest.mark.parametrize(("program", "form"), [("mlx", MLX), ("vLLM", GPTQ)])
def test_the_table_of_programs_has_the_bits_that_their_formats_are_asked_for(program: str, form: Format) -> None:
    text = (RECIPES.parent / "docs" / "programs.md").read_text()
    (cell,) = re.findall(rf"^\| \[{program}\]\(\S+\) \| ([^|]*) \|", text, flags=re.MULTILINE)
    assert [int(bits) for bits in re.findall(r"\d", cell)] == list(form.bits)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama3", (4096, 14336)), ("gemma3", (1152, 6912)), ("phi4", (3072, 8192)), ("qwen3_moe", (2048, 768))],
)
def test_layers_have_the_sizes_of_the_real_model(name: str, shape: tuple[int, int]) -> None:
    down = [layer for layer in target_recipes.FAMILIES[name].layers() if "down_proj" in layer.name]
    assert {(layer.rows, layer.columns) for layer in down} == {shape}
