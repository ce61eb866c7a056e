"""A plan says what happens to every layer, and refuses what cannot be before a weight is read."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dashq import (
    Curvature,
    Estimator,
    Full,
    Grid,
    Grouping,
    Layer,
    LayerPlan,
    PlanError,
    Quantized,
    Recipe,
    Registry,
    Serializer,
    Solver,
    hookimpl,
    load_registry,
    make_plan,
    run,
)
from dashq.quantizing.opening import open_model
from dashq.recipe.plan import MOST_REASONS
from dashq.solving.arithmetic import round_to_nearest
from format_results import WITHOUT_EXPERTS
from pico import TRAINED_MIXTURE, pico_model
from recipes import PLAIN_EXPERTS, REGISTRY, build_recipe, mixture_scheme, small_recipe, small_scheme

LAYERS = (
    Layer(name="blocks.0.attention", rows=8, columns=48),
    Layer(name="blocks.0.down", rows=8, columns=80),
    Layer(name="blocks.1.attention", rows=8, columns=48),
    Layer(name="blocks.1.down", rows=8, columns=80),
)


class FullEstimator(Estimator):
    """H = XᵀX, the whole of it."""

    name = "whole"
    produces = Full

    def start(self, layer: Layer) -> Tensor:
        return torch.zeros(layer.columns, layer.columns)

    def update(self, state: Tensor, x: Tensor, token_weight: Tensor) -> Tensor:
        return state + x.T @ (token_weight[:, None] * x)

    def merge(self, state: Tensor, other: Tensor) -> Tensor:
        return state + other

    def finish(self, state: Tensor) -> Full:
        return Full(state)


class FeedbackSolver(Solver):
    """Stands for a solver that reads what lies off the diagonal."""

    name = "compensating"
    needs = Full

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        assert isinstance(curvature, Full)
        return round_to_nearest(grouping.split(weight), grid, grouping)


WITH_FULL = load_registry(
    SimpleNamespace(
        dashq_estimators=hookimpl(lambda: [FullEstimator]), dashq_solvers=hookimpl(lambda: [FeedbackSolver])
    )
)


def plan(registry: Registry = REGISTRY, **changes: Any) -> dict[str, LayerPlan]:
    """The plans for `LAYERS` by name."""
    recipe = Recipe.model_validate(small_recipe(Path("model"), Path("out"), **changes), context=registry)
    return {plan.layer.name: plan for plan in make_plan(recipe, LAYERS)}


def test_the_last_override_that_matches_has_the_last_word_entry_by_entry() -> None:
    overrides = [{"match": r".*\.down", "bits": 4, "solver": "rtn"}, {"match": r"blocks\.1\..*", "bits": 8}]
    plans = plan(overrides=overrides)
    assert {name: (p.rule, p.scheme.bits, p.scheme.solver.name) for name, p in plans.items()} == {
        "blocks.0.attention": ("scheme", 3, "irls"),
        "blocks.0.down": ("override 1", 4, "rtn"),
        "blocks.1.attention": ("override 2", 8, "irls"),
        "blocks.1.down": ("override 1+2", 8, "rtn"),
    }


def test_skipped_layers_have_no_plan_and_a_later_override_can_take_one_back() -> None:
    overrides = [{"match": ".*down", "skip": True}, {"match": ".*1.down", "skip": False}]
    assert plan(overrides=overrides).keys() == {"blocks.0.attention", "blocks.1.attention", "blocks.1.down"}


@pytest.mark.parametrize("match", ["down", "blocks", "blocks.0", "lm_head"])
def test_an_override_must_match_the_whole_name_of_some_layer(match: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(overrides=[{"match": ".*", "bits": 4}, {"match": match, "bits": 2}])
    assert f"override 2 ({match!r}) matches no layer" in str(error.value)
    assert "The first layers are: blocks.0.attention, blocks.0.down" in str(error.value)


UNTIED = (
    Layer(name="embed", rows=32, columns=96, role="embeddings"),
    Layer(name="lm_head", rows=32, columns=96, role="head"),
)
TIED = (Layer(name="embed", rows=32, columns=96, role="tied"),)


def plan_with(outside: tuple[Layer, ...], **changes: Any) -> dict[str, LayerPlan]:
    """The plans for `LAYERS` and for what lies outside of blocks, by name."""
    recipe = Recipe.model_validate(small_recipe(Path("model"), Path("out"), **changes), context=REGISTRY)
    return {plan.layer.name: plan for plan in make_plan(recipe, [*LAYERS, *outside])}


def test_embeddings_and_head_are_planned_only_where_the_recipe_asks() -> None:
    assert plan_with(UNTIED).keys() == plan().keys()
    assert plan_with(UNTIED, embeddings={"bits": 8}).keys() - plan().keys() == {"embed"}
    assert plan_with(UNTIED, head={}).keys() - plan().keys() == {"lm_head"}


def test_their_entries_are_over_the_scheme_and_over_overrides() -> None:
    overrides = [{"match": ".*", "bits": 5}, {"match": "lm_head", "solver": "rtn", "skip": True}]
    plans = plan_with(UNTIED, overrides=overrides, embeddings={"bits": 8, "solver": "closed_form"}, head={})
    schemes = {name: (plans[name].rule, plans[name].scheme.bits, plans[name].scheme.solver.name) for name in plans}
    assert schemes["embed"] == ("override 1+embeddings", 8, "closed_form")
    assert schemes["lm_head"] == ("override 1+2+head", 5, "rtn")
    assert plan_with(UNTIED, embeddings={"bits": 8})["embed"].rule == "embeddings"
    assert plan_with(TIED, embeddings={}, scheme=small_scheme(bits=2))["embed"].grid.bits == 2


def test_they_are_quantized_where_all_blocks_are_skipped() -> None:
    assert plan_with(UNTIED, scheme=small_scheme(skip=True), head={"bits": 8}).keys() == {"lm_head"}


@pytest.mark.parametrize("key", ["embeddings", "head"])
def test_one_matrix_for_both_is_planned_once_under_either_key(key: str) -> None:
    assert plan_with(TIED, **{key: {"bits": 8}})["embed"].rule == key
    both = {"embeddings": {"bits": 8}, "head": {"bits": 8}}
    assert plan_with(TIED, **both)["embed"].scheme.bits == 8
    with pytest.raises(PlanError, match=r"one matrix in this model, embed: .* under `embeddings` or under `head`"):
        plan_with(TIED, **(both | {key: {"bits": 4}}))


def test_an_entry_for_what_the_model_has_not_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^head: this model has none that can be quantized"):
        plan_with(UNTIED[:1], head={"bits": 8})


def test_an_override_for_what_is_left_as_it_is_names_the_entry_that_is_missing() -> None:
    with pytest.raises(PlanError, match=r"override 1 \('lm_head'\): lm_head is quantized only where .* entry `head`$"):
        plan_with(UNTIED, overrides=[{"match": "lm_head", "bits": 8}])


@pytest.mark.parametrize(
    ("serializer", "outside", "entry", "reason"),
    [
        ("gptq", UNTIED, "embeddings", "format gptq cannot hold embeddings, which its programs do not read packed"),
        ("compressed-tensors", TIED, "head", "format compressed-tensors cannot hold one matrix that is both"),
        ("metal", UNTIED, "head", "format metal cannot hold the head"),
    ],
)
def test_formats_refuse_what_their_programs_do_not_read_and_name_those_that_can(
    serializer: str, outside: tuple[Layer, ...], entry: str, reason: str
) -> None:
    changes = {entry: {"bits": 4, "grouper": {"name": "contiguous", "size": 32}}}
    scheme = small_scheme(16, bits=4, skip=True)
    with pytest.raises(PlanError, match=rf"{reason}.*\. Formats that can hold such a layer: .*dashq, .*mlx"):
        plan_with(outside, serializer=serializer, scheme=scheme, **changes)


def test_skipping_every_layer_leaves_nothing_to_do() -> None:
    with pytest.raises(PlanError, match="every one of the 4 layers is skipped"):
        plan(scheme=small_scheme(skip=True))


def test_a_group_size_that_does_not_divide_names_layers_and_sizes_that_do() -> None:
    with pytest.raises(PlanError) as error:
        plan(scheme=small_scheme(32))
    attention, down = str(error.value).splitlines()
    for line, layer, columns in ((attention, "blocks.0.attention", 48), (down, "blocks.0.down", 80)):
        assert line.startswith(f"{layer} and 1 more: group size 32 does not divide {columns} columns")
        sizes = line.partition("that do: ")[2].partition(";")[0]
        assert sizes
        assert all(columns % int(size) == 0 for size in sizes.split(", "))
        assert "`uneven: divisor` or `uneven: pad`" in line


@pytest.mark.parametrize(
    ("uneven", "size", "expected"),
    [("divisor", 32, (24, 20)), ("divisor", 1000, (48, 80)), ("pad", 32, (32, 32)), ("pad", 64, (48, 64))],
)
def test_the_recipe_decides_what_an_uneven_group_size_becomes(
    uneven: str, size: int, expected: tuple[int, int]
) -> None:
    plans = plan(scheme=small_scheme(grouper={"name": "contiguous", "size": size, "uneven": uneven}))
    assert (plans["blocks.0.attention"].size, plans["blocks.0.down"].size) == expected


class EvenSerializer(Serializer):
    """Holds 2 and 4 bits only."""

    name = "even"

    def grid(self, bits: int) -> Grid:
        if bits not in (2, 4):
            raise PlanError(f"the even format holds 2 or 4 bits, not {bits}")
        return Grid(bits=bits, dtype=torch.float16)

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        return {"codes": quantized.codes, "scale": quantized.scale, "offset": quantized.offset}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        raise NotImplementedError  # nothing is read back here


def test_bits_that_the_format_cannot_hold_are_refused_by_layer() -> None:
    registry = load_registry(SimpleNamespace(dashq_serializers=hookimpl(lambda: [EvenSerializer])))
    overrides = [{"match": ".*down", "bits": 4}]
    assert plan(registry, scheme=small_scheme(bits=2), overrides=overrides, serializer="even")
    reason = (
        r"^blocks\.0\.attention and 1 more: the even format holds 2 or 4 bits, not 3\. Formats that can .*: .*dashq"
    )
    with pytest.raises(PlanError, match=reason):
        plan(registry, overrides=overrides, serializer="even")


def test_a_plugin_that_was_given_by_hand_is_advised() -> None:
    registry = load_registry(SimpleNamespace(dashq_serializers=hookimpl(lambda: [EvenSerializer])))
    with pytest.raises(PlanError, match=r"mlx holds groups of .* Formats that can [^:]*: .*\beven\b"):
        plan(registry, scheme=small_scheme(bits=2), serializer="mlx")


class CountingSerializer(EvenSerializer):
    """Counts how often it is tried; holds 4 bits only."""

    name = "counting"
    packs: ClassVar[list[int]] = []

    def pack(self, quantized: Quantized) -> dict[str, Tensor]:
        self.packs.append(quantized.grid.bits)
        if quantized.grid.bits != 4:
            raise PlanError("the counting format holds 4 bits")
        return super().pack(quantized)


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_of_one_shape_are_planned_and_advised_about_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry(SimpleNamespace(dashq_serializers=hookimpl(lambda: [CountingSerializer])))
    fields = small_recipe(
        Path("model"), Path("out"), scheme=small_scheme(bits=bits, router="routed"), serializer="counting"
    )
    recipe = Recipe.model_validate(fields, context=registry)
    experts = [Layer(name=f"experts.{index}", rows=8, columns=48, expert=index) for index in range(500)]
    monkeypatch.setattr(CountingSerializer, "packs", [])
    if bits == 4:
        assert [plan.layer for plan in make_plan(recipe, experts)] == experts
        assert CountingSerializer.packs == [4]
    else:
        with pytest.raises(PlanError, match=r"^experts\.0 and 499 more: the counting format holds 4 bits\. Formats"):
            make_plan(recipe, experts)
        assert CountingSerializer.packs == [2, 2]  # the plan itself, and as one of the formats that might have been


def test_experts_without_a_router_are_told_the_installed_ones(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path / "model", tmp_path / "out")
    with pytest.raises(PlanError) as error:
        make_plan(recipe, [Layer(name="experts.0", rows=8, columns=48, expert=0)])
    assert str(error.value) == (
        "experts.0: an expert of a mixture, and its scheme has no router to say which tokens count for it; "
        f"add `router:` with one of those installed: {', '.join(REGISTRY.routers)}"
    )


def test_a_solver_that_needs_more_than_its_estimator_produces_is_refused() -> None:
    with pytest.raises(PlanError) as error:
        plan(WITH_FULL, overrides=[{"match": r"blocks\.1\.down", "solver": "compensating"}])
    assert str(error.value) == (
        "blocks.1.down: solver 'compensating' needs Full curvature, but estimator 'diagonal' produces Diagonal. "
        "Estimators that fit: full, hybrid, whole"
    )


@pytest.mark.parametrize("solver", ["irls", "compensating"])
def test_a_richer_curvature_is_good_for_every_solver(solver: str, tmp_path: Path) -> None:
    assert plan(WITH_FULL, scheme=small_scheme(estimator="whole", solver=solver)).keys() == {
        layer.name for layer in LAYERS
    }
    changes = {"scheme": small_scheme(estimator="whole", solver=solver)}
    out = run(build_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out", WITH_FULL, **changes))
    assert (out / "report.json").exists()


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(PlanError) as error:
        plan(
            WITH_FULL,
            overrides=[
                {"match": ".*attention", "solver": "compensating"},
                {"match": ".*down", "grouper": {"name": "contiguous", "size": 7}},
            ],
        )
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "blocks.0.attention and 1 more",
        "blocks.0.down and 1 more",
    ]


def test_of_very_many_reasons_the_first_are_told_and_the_others_counted() -> None:
    layers = [Layer(name=f"blocks.{width}.up", rows=8, columns=64 * width + 1) for width in range(1, MOST_REASONS + 3)]
    recipe = Recipe.model_validate(small_recipe(Path("model"), Path("out")), context=REGISTRY)
    with pytest.raises(PlanError) as error:
        make_plan(recipe, [*layers, layers[-1]])
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [layer.name for layer in layers[:MOST_REASONS]]
    assert lines[-1] == "and 3 layers for 2 other reasons"


def test_experts_without_a_router_plugin_are_refused_by_name_or_left_as_they_are(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    experts = load_file(tmp_path / "model" / "model.safetensors")
    with pytest.raises(PlanError) as error:
        run(build_recipe(tmp_path / "model", tmp_path / "refused"))
    assert "model.layers.0.mlp.experts." in str(error.value)
    assert "has no router" in str(error.value)

    skip = [{"match": r".*\.experts\..*", "skip": True}]
    out = run(build_recipe(tmp_path / "model", tmp_path / "out", overrides=skip))
    written = load_file(out / "model.safetensors")
    attention = {name for name in experts if name.endswith("_proj.weight") and ".self_attn." in name}
    assert {name.removesuffix(".weight") for name in attention} == {
        name.removesuffix(".codes") for name in written if name.endswith(".codes")
    }


GROUPERS: list[Any] = [
    {"name": "contiguous", "size": 16},
    {"name": "contiguous", "size": 5, "uneven": "pad"},
    {"name": "contiguous", "size": 64, "uneven": "divisor"},
    "channel",
]


def test_planned_bytes_are_the_bytes_written(tmp_path: Path) -> None:
    pico_model("llama", tmp_path / "model")
    layers = open_model(build_recipe(tmp_path / "model", tmp_path / "names")).layers()
    overrides = [
        {"match": re.escape(layer.name), "bits": 1 + index % 8, "grouper": GROUPERS[index // 6]}
        for index, layer in enumerate(layers)
    ]
    recipe = build_recipe(tmp_path / "model", tmp_path / "out", overrides=overrides)
    plans = make_plan(recipe, layers)
    written = load_file(run(recipe) / "model.safetensors")
    assert {plan.grid.bits for plan in plans} == set(range(1, 9))
    for plan in plans:
        tensors = [tensor for name, tensor in written.items() if name.startswith(f"{plan.layer.name}.")]
        assert plan.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors), plan


@settings(max_examples=40)
@given(bits=st.integers(1, 8), size=st.integers(1, 100))
def test_a_plan_counts_codes_and_a_scale_and_offset_for_each_group(bits: int, size: int) -> None:
    plans = plan(scheme=small_scheme(bits=bits, grouper={"name": "contiguous", "size": size, "uneven": "pad"}))
    for layer in LAYERS:
        groups = -(-layer.columns // size)
        assert plans[layer.name].bytes == layer.rows * (layer.columns * bits // 8 + groups * 2 * 2)
        assert plans[layer.name].bits_per_weight == pytest.approx(bits + 32 * groups / layer.columns)


def test_an_expert_that_does_not_exist_is_told_how_many_there_are(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    overrides = [{"match": r".*\.experts\.down_proj\.4", "bits": 4}]
    with pytest.raises(PlanError, match=r"matches no layer.*The experts of a mixture are numbered 0 to 3"):
        run(build_recipe(tmp_path / "model", tmp_path / "out", scheme=mixture_scheme(), overrides=overrides))


def test_experts_need_a_router_plugin(tmp_path: Path) -> None:
    pico_model("mixtral", tmp_path / "model")
    with pytest.raises(PlanError, match=r"experts\.gate_up_proj\.0 and 23 more: .* no router .*installed: .*routed"):
        run(build_recipe(tmp_path / "model", tmp_path / "out"))


@pytest.mark.parametrize(
    ("serializer", "bits", "size", "solver", "reason"),
    [
        ("metal", 3, 64, "irls", "format metal holds 2, 4, 8 bits, not 3. Formats that can hold such a layer: .*mlx"),
        ("mlx", 2, 16, "irls", "format mlx holds groups of 32, 64 or 128, not 16. Formats that can hold .*dashq"),
        ("gguf", 2, 64, "k_quant", r"\(Q2_K\) needs groups of 16 and a multiple of 256 columns"),
        ("gguf", 2, 16, "closed_form", "solver 'closed_form' cannot work .* Solvers that can: k_quant"),
        (
            {"name": "gguf", "two_bits": "IQ2_S"},
            2,
            16,
            "closed_form",
            "solver 'closed_form' cannot work .* Solvers that can: k_quant",
        ),
        ("dashq", 2, 16, "k_quant", "super-blocks alone, .* Solvers that can: closed_form, exact, irls, rtn"),
        ({"name": "gptq", "version": 1}, 4, 64, "irls", "version 1 cannot hold every whole zero"),
    ],
)
def test_the_plan_refuses_what_a_format_cannot_hold(
    serializer: Any, bits: int, size: int, solver: str, reason: str, wide_model: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(
        wide_model, tmp_path / "out", scheme=small_scheme(size, bits=bits, solver=solver), serializer=serializer
    )
    with pytest.raises(PlanError, match=reason):
        run(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_experts_are_refused_by_layer_with_the_formats_that_could(name: str, tmp_path: Path) -> None:
    recipe = build_recipe(
        TRAINED_MIXTURE, tmp_path / "out", scheme=small_scheme(32, bits=4, router="routed"), serializer=name
    )
    reason = (
        rf"model\.layers\.0\.mlp\.experts\.gate_up_proj\.0 and 63 more: format {name} cannot hold experts of a "
        "mixture, which its programs keep otherwise. Formats that can hold such a layer: dashq, mlx$"
    )
    with pytest.raises(PlanError, match=reason):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_programs_that_would_not_find_experts_get_no_mixture_at_all(tmp_path: Path) -> None:
    recipe = build_recipe(
        TRAINED_MIXTURE,
        tmp_path / "out",
        scheme=small_scheme(32, bits=4, router="routed"),
        serializer="gptq",
        overrides=[PLAIN_EXPERTS],
    )
    with pytest.raises(
        PlanError,
        match=r"model.layers.0.mlp.experts.gate_up_proj: the programs of format .*Formats that can hold it: dashq",
    ):
        run(recipe)


@pytest.mark.parametrize("name", ["mlx", "metal", "compressed-tensors", "gptq"])
def test_transposed_layers_are_refused(name: str, tmp_path: Path) -> None:
    model = pico_model("gpt2", tmp_path / "model", torch.float16, n_embd=64, hidden_size=64, n_inner=96)
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer=name)
    with pytest.raises(
        PlanError,
        match=r"transformer.h.0.attn.c_attn: format .* not a Conv1D, whose weight is transposed.*"
        r"Formats that can hold it: dashq",
    ):
        run(recipe)
