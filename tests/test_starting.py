"""From a model and a wish to a result: the recipe stands beside the output, and is never replaced unasked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dashq
from dashq import DashqError, OutputError, Target, UsageError, Wish
from dashq.starting import (
    CHAT,
    begin,
    load_recipe,
    quantize,
    read_target,
    recipe_of,
    starting_command,
    usual_output,
    wish_for,
)
from pico import WIDE, pico_model
from recipes import REGISTRY, build_recipe, write_recipe


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pico"
    sizes: dict[str, Any] = {**WIDE, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 512}
    return pico_model("llama", folder, torch.float16, **sizes)


def wish(model: Path, output: Path, bits: float = 2) -> Wish:
    return wish_for(str(model), bits, output, "pydoc", "fast")


def test_a_model_becomes_a_result_in_one_call(long_model: Path, tmp_path: Path) -> None:
    result = dashq.quantize(long_model, bits=3, output=tmp_path / "out", text="pydoc", level="fast")
    assert result.path == tmp_path / "out"
    assert result.report.totals.bits_per_weight == 3.5
    network = result.open()
    assert network(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    again = dashq.load_recipe(tmp_path / "out.yaml", REGISTRY)
    assert again.output == tmp_path / "out"


@pytest.mark.parametrize(
    ("serializer", "target"),
    [
        ("dashq", "dashq"),
        ("mlx", "mlx"),
        ("metal", "transformers"),
        ("compressed-tensors", "transformers"),
        ("gptq", "vllm"),
        ("gguf", "llama.cpp"),
        ({"name": "gguf", "modelfile": True}, "ollama"),
        ("dashq-packed-linear", None),
    ],
)
def test_a_result_is_started_in_the_program_that_its_format_is_made_for(
    serializer: Any, target: str | None, tmp_path: Path
) -> None:
    recipe = build_recipe(tmp_path / "model", tmp_path / "out", serializer=serializer)
    assert starting_command(recipe) == (REGISTRY.targets[target].command if target else CHAT)


@pytest.mark.parametrize(
    ("named", "own", "started"),
    [
        ("vllm", {}, "vllm"),
        ("vllm", {"serializer": {"name": "compressed-tensors", "zero": "integer"}}, "vllm"),
        ("ollama", {}, "ollama"),
        ("llama.cpp", {"serializer": "dashq"}, "dashq"),
        ("mlx", {"serializer": "dashq-packed-linear"}, None),
    ],
)
def test_a_result_is_started_in_the_program_that_the_recipe_names_where_its_format_is_for_that(
    named: str, own: dict[str, Any], started: str | None, long_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    purpose = {"name": named, "bits": 4}
    write_recipe(path, {"for": purpose, "model": str(long_model), "output": str(tmp_path / "out"), **own})
    command = starting_command(load_recipe(path, REGISTRY))
    assert command == (REGISTRY.targets[started].command if started else CHAT)


def test_a_target_of_a_plugin_starts_results_of_formats_that_suit_it(long_model: Path, tmp_path: Path) -> None:
    native = REGISTRY.targets["dashq"].recipe
    abacus = Target(name="abacus", recipe=native, suits=lambda serializer: True, command="abacus {output}")
    assert (
        starting_command(
            recipe_of(abacus, wish(long_model, tmp_path / "out"), replace(REGISTRY, targets={"abacus": abacus}))
        )
        == "abacus {output}"
    )


def test_the_recipe_of_a_wish_tells_what_the_target_chose(long_model: Path, tmp_path: Path) -> None:
    mlx = REGISTRY.targets["mlx"]
    for recipe in (
        recipe_of(mlx, wish(long_model, tmp_path / "out", 3), REGISTRY),
        begin(mlx, wish(long_model, tmp_path / "out", 3), REGISTRY),
    ):
        assert recipe.completed.startswith("for mlx: calibration.samples: 16; calibration.sequence_length: 512; ")
        assert "scheme: {bits: 3, " in recipe.completed
        assert recipe.completed.endswith("; serializer: mlx")
        assert "pydoc" not in recipe.completed  # the text is the wish's own


@pytest.mark.parametrize(
    ("model", "bits", "output"),
    [
        ("models/SmolLM2/", 2, "out/SmolLM2-2bit"),
        ("files/small.Q8_0.gguf", 2.5, "out/small.Q8_0-2.5bit"),
        ("someone/Model-7B", 4.0, "out/Model-7B-4bit"),
    ],
)
def test_an_output_has_the_names_of_model_and_bits(model: str, bits: float, output: str) -> None:
    assert usual_output(model, bits) == Path(output)


def test_the_same_recipe_may_be_there_and_another_is_replaced_only_if_asked(long_model: Path, tmp_path: Path) -> None:
    target, output, path = REGISTRY.targets["dashq"], tmp_path / "deep" / "out", tmp_path / "deep" / "out.yaml"
    assert begin(target, wish(long_model, output), REGISTRY).output == output
    text = path.read_text()
    begin(target, wish(long_model, output), REGISTRY)
    with pytest.raises(OutputError, match=f"{path} is another recipe than this would be"):
        begin(target, wish(long_model, output, bits=3), REGISTRY)
    assert path.read_text() == text
    assert begin(target, wish(long_model, output, bits=3), REGISTRY, overwrite=True).scheme.bits == 3
    assert path.read_text() != text


def test_what_stands_in_place_of_the_recipe_and_is_none_is_an_error(long_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.yaml").mkdir()
    with pytest.raises(OutputError, match="cannot read what stands in place of the recipe"):
        begin(REGISTRY.targets["dashq"], wish(long_model, tmp_path / "out"), REGISTRY)


def test_what_cannot_be_run_leaves_no_recipe(long_model: Path, tmp_path: Path) -> None:
    inside = long_model / "sub"
    with pytest.raises(OutputError):
        begin(REGISTRY.targets["dashq"], wish(long_model, inside), REGISTRY)
    assert not inside.with_name("sub.yaml").exists()
    no_text = wish_for(str(long_model), 2, tmp_path / "out", str(tmp_path / "none.txt"), "fast")
    with pytest.raises(DashqError):
        begin(REGISTRY.targets["dashq"], no_text, REGISTRY)
    assert not list(tmp_path.iterdir())


def test_a_model_of_few_positions_gets_short_samples(tmp_path: Path) -> None:
    short = pico_model("llama", tmp_path / "short", torch.float16, **WIDE)
    assert wish(short, tmp_path / "out").sequence_length == 256


@pytest.mark.parametrize("output", ["", ".", "a/.."])
def test_an_output_without_a_name_is_refused(output: str, long_model: Path) -> None:
    with pytest.raises(UsageError, match="--output should be a folder by a name"):
        wish(long_model, Path(output))


@pytest.mark.parametrize("bits", [0.5, 9, float("nan")])
def test_bits_that_nobody_can_have_are_refused(bits: float, long_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--bits should be from 1 to 8, not"):
        wish(long_model, tmp_path / "out", bits)


def test_an_unknown_level_or_target_is_told_with_those_that_there_are(long_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no level 'bset'. Did you mean 'best'\? Possible: fast, usual, best"):
        wish_for(str(long_model), 2, tmp_path / "out", "pydoc", "bset")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no target 'vlm'. Did you mean 'vllm'\? Installed: dashq, llama.cpp"):
        read_target("vlm", REGISTRY)


def test_a_mistake_is_found_before_a_recipe_is_written(long_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bits should be one of"):
        quantize(str(long_model), bits=5, output=tmp_path / "out", target="vllm")
    assert not (tmp_path / "out.yaml").exists()
