"""Every target's recipes can be planned, take no more bits than were wished, and say what is possible instead."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import Layer, LayerPlan, UsageError, Wish, load_recipe, make_plan
from dashq.measuring.choosing import choices_for, settle
from dashq.measuring.sensitivity import analyze
from dashq.programs import LEVELS, Level
from dashq.quantizing.opening import open_model, plan_model
from dashq.starting import wish_for
from dashq_plugins.formats.gguf.blocks import type_of
from dashq_plugins.targets import FOR_MIXTURES
from gguf_results import FAMILIES as GGUF
from gguf_results import SHARED as GEMMA
from pico import WIDE, pico_model
from recipes import REGISTRY

NAMES = ("dashq", "llama.cpp", "mlx", "ollama", "transformers", "vllm")
SIZES: dict[str, dict[str, Any]] = {
    "wide": WIDE,
    "mixed": WIDE | {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 48},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose columns are multiples of 256 throughout, and one where they are in `down_proj` alone."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: pico_model("llama", folder / name, torch.float16, max_position_embeddings=1024, **sizes)
        for name, sizes in SIZES.items()
    }


def plans(target: str, model: Path, bits: float, output: Path, level: Level = "usual") -> tuple[LayerPlan, ...]:
    text = REGISTRY.targets[target].recipe(wish_for(str(model), bits, output, "pydoc", level))
    path = output.with_name("recipe.yaml")
    path.write_text(text)
    recipe = load_recipe(path, REGISTRY)
    assert (recipe.model, recipe.output) == (str(model), output)
    assert (recipe.tuner is None) == (level != "best")
    return plan_model(recipe, open_model(recipe))


def inside(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    return [plan for plan in layers if plan.layer.role == "linear"]


def average(layers: Sequence[LayerPlan]) -> float:
    return 8 * sum(plan.bytes for plan in inside(layers)) / sum(plan.layer.weights for plan in inside(layers))


def test_these_targets_are_there() -> None:
    assert tuple(REGISTRY.targets) == NAMES
    assert all("{output}" in target.command for target in REGISTRY.targets.values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_whole_bits_are_those_of_codes(
    name: str, bits: int, level: Level, models: dict[str, Path], tmp_path: Path
) -> None:
    planned = plans(name, models["wide"], bits, tmp_path / "out", level)
    assert {plan.grid.bits for plan in inside(planned)} == {bits}


@pytest.mark.parametrize(("bits", "least"), [(2.625, 2.25), (3.5, 3.25), (4.6, 4.25), (5.25, 4.5)])
@pytest.mark.parametrize("name", NAMES)
def test_a_fraction_is_the_most_that_a_weight_takes(
    name: str, bits: float, least: float, models: dict[str, Path], tmp_path: Path
) -> None:
    taken = average(plans(name, models["wide"], bits, tmp_path / "out"))
    assert least <= taken <= bits


@pytest.mark.parametrize(
    ("name", "bits"), [("llama.cpp", 4.5), ("llama.cpp", 5.25), ("dashq", 2.75), ("vllm", 3.6), ("mlx", 2.6)]
)
def test_a_fraction_holds_where_layers_differ_in_width(
    name: str, bits: float, models: dict[str, Path], tmp_path: Path
) -> None:
    assert average(plans(name, models["mixed"], bits, tmp_path / "out")) <= bits


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "elsewhere"), [(2, 4), (3, 4), (4, 4), (5, 5), (6, 8), (8, 8)])
def test_narrow_layers_get_plain_blocks_in_llama_cpp(
    bits: int, elsewhere: int, level: Level, models: dict[str, Path], tmp_path: Path
) -> None:
    for plan in inside(plans("llama.cpp", models["mixed"], bits, tmp_path / "out", level)):
        down, kind = plan.layer.name.endswith("down_proj"), type_of(plan.grid).name
        assert plan.grid.bits == (bits if down else elsewhere)
        if down and bits in (2, 3, 4, 6):
            assert kind == ({2: "IQ2_S", 3: "IQ3_S"}.get(bits, f"Q{bits}_K") if level == "best" else f"Q{bits}_K")
        else:
            assert kind == {4: "IQ4_NL", 5: "Q5_1", 8: "Q8_0"}[elsewhere]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_columns_of_heads_that_lie_in_another_order_get_plain_blocks_in_llama_cpp(
    bits: int, level: Level, tmp_path: Path
) -> None:
    heads: dict[str, Any] = {"head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    sizes: dict[str, Any] = {**SIZES["wide"], **heads, "max_position_embeddings": 1024}
    model = pico_model("qwen3_5", tmp_path / "model", torch.float16, **sizes)
    planned = plans("llama.cpp", model, bits, tmp_path / "out", level)
    kinds = {plan.layer.name.partition("layers.0.")[2]: type_of(plan.grid) for plan in inside(planned)}
    assert kinds["linear_attn.out_proj"].columns == 32
    assert kinds["mlp.down_proj"].columns == (32 if bits == 5 else 256)
    recipe = load_recipe(tmp_path / "recipe.yaml", REGISTRY)
    matches = [override.match.pattern for override in recipe.overrides if override.match]
    assert matches == ([] if bits == 5 and level != "best" else [HEADS])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased"])
@pytest.mark.parametrize(
    ("name", "size", "bits", "stored"),
    [
        ("dashq", "wide", 2, "5 bits in groups of 256"),
        ("dashq", "mixed", 4, "6 bits in groups of 64"),
        ("mlx", "wide", 3, "5 bits in groups of 128"),
        ("mlx", "mixed", 8, "8 bits in groups of 64"),
        ("llama.cpp", "wide", 2, "Q6_K"),
        ("llama.cpp", "wide", 8, "Q8_0"),
        ("ollama", "mixed", 3, "Q5_1"),
        ("ollama", "mixed", 4, "Q8_0"),
    ],
)
def test_embeddings_and_head_get_more_bits_than_blocks_where_a_program_reads_them_packed(
    name: str, size: str, bits: int, stored: str, family: str, level: Level, tmp_path: Path
) -> None:
    model = pico_model(family, tmp_path / "model", torch.float16, max_position_embeddings=1024, **SIZES[size])
    planned = plans(name, model, bits, tmp_path / "out", level)
    outside = [plan for plan in planned if plan.layer.role != "linear"]
    assert [plan.layer.role for plan in outside] == (["tied"] if family == "llama" else ["embeddings", "head"])
    for plan in outside:
        in_groups = f"{plan.grid.bits} bits in groups of {plan.size}"
        assert stored == (in_groups if name in ("dashq", "mlx") else type_of(plan.grid).name)


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_other_programs_get_embeddings_and_head_as_they_are(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    planned = plans(name, models["wide"], 4, tmp_path / "out")
    assert inside(planned) == list(planned)


HEADS = r".*\.(out_proj)(\..*)?"
USUAL = Wish(
    model="model",
    output=Path("out"),
    bits=2.0,
    level="usual",
    text="pydoc",
    sequence_length=512,
    layers=[Layer(name="model.layers.0.mlp.down_proj", rows=64, columns=256)],
)


def wish(bits: float, columns: int) -> Wish:
    return replace(USUAL, bits=bits, layers=[Layer(name="model.layers.0.mlp.down_proj", rows=64, columns=columns)])


@pytest.mark.parametrize(
    ("name", "bits", "columns", "reason"),
    [
        ("vllm", 5.0, 256, "bits should be one of 2, 3, 4, 8, or at least 2.641"),
        ("mlx", 2.1, 256, "or at least 2.25 on average, not 2.1"),
        ("llama.cpp", 2.0, 192, r"bits, .*: 4 \(IQ4_NL: 4.5\), 4 \(Q4_1: 5\), 5 \(Q5_1: 6\), 8 \(Q8_0: 8.5\); none"),
        ("ollama", 7.0, 256, r"2 \(Q2_K: 2.625\), 3 .* 8 \(Q8_0: 8.5\); none for 7"),
    ],
)
def test_what_a_program_cannot_have_is_refused_with_what_it_can(
    name: str, bits: float, columns: int, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        REGISTRY.targets[name].recipe(wish(bits, columns))


@pytest.mark.parametrize(("bits", "name"), [(2, "IQ2_S"), (3, "IQ3_S"), (4, "Q4_K")])
def test_the_best_quality_takes_codebooks_for_llama_cpp(
    bits: int, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    usual = plans("llama.cpp", models["wide"], bits, tmp_path / "out")
    best = plans("llama.cpp", models["wide"], bits, tmp_path / "out", "best")
    assert {type_of(plan.grid).name for plan in inside(best)} == {name}
    assert {type_of(plan.grid).name for plan in inside(usual)} == {f"Q{bits}_K"}
    assert average(best) <= average(usual)


@pytest.mark.parametrize(
    ("size", "bits", "types"),
    [
        ("wide", 3, ["IQ2_S", "IQ3_S", "Q4_K"]),
        ("wide", 2.9, ["IQ2_S", "IQ3_S"]),
        ("wide", 4, ["IQ3_S", "Q4_K", "Q5_K"]),
        ("wide", 5, ["Q4_K", "Q5_K", "Q6_K"]),
        ("wide", 8, ["Q6_K", "Q8_0"]),
        ("mixed", 3, ["IQ2_S", "IQ3_S", "Q4_K"]),  # of `down_proj`; others are IQ4_NL
        ("mixed", 5, ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"]),
        ("wide", 2, None),  # of the smallest type all are
    ],
)
def test_the_best_quality_has_a_budget_among_types_of_llama_cpp(
    size: str, bits: float, types: list[str] | None, models: dict[str, Path], tmp_path: Path
) -> None:
    plans("llama.cpp", models[size], bits, tmp_path / "out", "best")
    path = tmp_path / "recipe.yaml"
    budget = load_recipe(path, REGISTRY).budget
    if types is None:
        assert budget is None
        assert "# Without a budget: llama.cpp has no smaller type" in path.read_text()
        return
    assert budget
    assert list(budget.types) == types
    plans("llama.cpp", models[size], bits, tmp_path / "out", "usual")
    assert load_recipe(path, REGISTRY).budget is None


def test_the_budget_is_spent_on_types_that_differ(tmp_path: Path) -> None:
    sizes: dict[str, Any] = WIDE | {
        "intermediate_size": 256,
        "num_hidden_layers": 1,
    }  # enough for seven layers to choose for
    model = pico_model("llama", tmp_path / "model", torch.float16, max_position_embeddings=1024, **sizes)
    plans("llama.cpp", model, 2.9, tmp_path / "out", "best")
    recipe = load_recipe(tmp_path / "recipe.yaml", REGISTRY)
    short = recipe.calibration.model_copy(update={"samples": 2, "sequence_length": 64})
    recipe = recipe.model_copy(update={"calibration": short})
    opened = open_model(recipe)
    result, _ = settle(recipe, opened, analyze(recipe, opened, choices_for(recipe, opened)))
    chosen = make_plan(result, opened.all_layers())
    assert 2.7 < average(chosen) <= 2.9
    assert {type_of(plan.grid).name for plan in inside(chosen)} == {"IQ2_S", "IQ3_S"}


@pytest.mark.parametrize(("bits", "width"), [(2, 256), (4, 192)])
def test_keys_and_values_of_latent_attention_stay_as_they_are_for_llama_cpp(
    bits: int, width: int, tmp_path: Path
) -> None:
    name, changes = GGUF["deepseek_v3"]
    sizes: dict[str, Any] = WIDE | changes | {"hidden_size": width, "q_lora_rank": width}
    model = pico_model(name, tmp_path / "model", torch.float16, **sizes)
    planned = {plan.layer.name.rpartition(".")[2] for plan in plans("llama.cpp", model, bits, tmp_path / "out")}
    assert "q_b_proj" in planned
    assert "kv_b_proj" not in planned


def test_layers_without_whole_blocks_of_columns_stay_as_they_are_for_llama_cpp(tmp_path: Path) -> None:
    """As those between a layer's inputs and the length of its steps in the smallest Mambas."""
    name, changes = GGUF["mamba"]
    sizes: dict[str, Any] = WIDE | changes | {"intermediate_size": 512, "time_step_rank": 48}
    model = pico_model(name, tmp_path / "model", torch.float16, **sizes)
    planned = {plan.layer.name.rpartition(".")[2] for plan in plans("llama.cpp", model, 4, tmp_path / "out")}
    assert {"in_proj", "x_proj", "out_proj"} <= planned
    assert "dt_proj" not in planned


def test_columns_that_no_size_divides_get_a_divisor() -> None:
    assert "size: 64, uneven: divisor" in REGISTRY.targets["dashq"].recipe(wish(2.0, 80))


def test_experts_have_a_router() -> None:
    layers = [Layer(name="model.layers.0.mlp.experts.up_proj.0", rows=64, columns=256, expert=0)]
    assert "router: blended" in REGISTRY.targets["dashq"].recipe(replace(USUAL, layers=layers))


def test_samples_are_as_long_as_the_model_allows() -> None:
    assert "sequence_length: 256\n" in REGISTRY.targets["dashq"].recipe(replace(USUAL, sequence_length=256))


def test_names_that_yaml_would_take_for_something_else_stand_in_quotes(tmp_path: Path) -> None:
    odd = replace(USUAL, model="no", output=Path("a: b"), text="#1")
    path = tmp_path / "recipe.yaml"
    path.write_text(REGISTRY.targets["dashq"].recipe(odd))
    recipe = load_recipe(path, REGISTRY)
    assert (recipe.model, str(recipe.output), recipe.calibration.dataset[0].name) == ("no", "a: b", "#1")


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_is_refused_where_its_experts_could_not_be_held(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = WIDE | {"max_position_embeddings": 1024}
    model = pico_model("mixtral", tmp_path / "mixture", torch.float16, **sizes)
    if name in FOR_MIXTURES:
        assert any(plan.layer.expert is not None for plan in plans(name, model, 4, tmp_path / "out", "fast"))
        return
    with pytest.raises(UsageError, match=r"mixtures are possible for dashq, mlx, llama\.cpp, ollama"):
        plans(name, model, 4, tmp_path / "out", "fast")


@pytest.mark.parametrize("target", ["dashq", "llama.cpp", "mlx"])
def test_embeddings_of_each_block_have_the_entry_of_the_others(target: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**GEMMA, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
    model = pico_model("gemma4", tmp_path / "model", torch.float16, **sizes)
    planned = plans(target, model, 3, tmp_path / "out", "fast")
    outer = {plan.layer.role: plan for plan in planned if plan.layer.role != "linear"}
    assert outer.keys() == {"tied", "per_layer"}
    assert outer["tied"].grid == outer["per_layer"].grid
    assert (tmp_path / "recipe.yaml").read_text().count("\nembeddings:") == 1
