"""A missing, broken or unfit checkpoint is refused by name, if it can be before anything is written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashq import CheckpointError, run
from pico import pico_model
from recipes import build_recipe

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards."""
    return pico_model("llama", tmp_path_factory.mktemp("checkpoint") / "model", shard="100KB")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return shutil.copytree(original, tmp_path / "model")


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        run(build_recipe(model, model.with_name("out")))
    return str(error.value)


def is_untouched(output: Path) -> bool:
    return not output.exists() or not any(output.iterdir())


def shard_of(model: Path, tensor: str) -> Path:
    name: str = json.loads((model / INDEX).read_text())["weight_map"][tensor]
    return model / name


def change(model: Path, name: str, mend: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the shard that holds a tensor; returns the shard's path."""
    path = shard_of(model, name)
    tensors = load_file(path)
    mend(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_missing_shard_is_named(model: Path) -> None:
    shard = shard_of(model, DOWN)
    shard.unlink()
    message = refusal(model)
    assert str(model) in message
    assert re.search(rf"lacks 1 of \d+ shards: {shard.name}", message)
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("keep", [0, 6, 100, -1], ids=["empty", "in the length", "in the header", "by one byte"])
def test_a_truncated_shard_is_named(keep: int, model: Path) -> None:
    shard = shard_of(model, DOWN)
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard} is truncated or not a safetensors file" in refusal(model)
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'],
    ids=["no JSON", "no text", "a list", "no map", "a list as map", "a number as shard"],
)
def test_an_index_that_is_garbage_is_named(content: bytes, model: Path) -> None:
    (model / INDEX).write_bytes(content)
    assert f"{model / INDEX} is not a readable index of shards" in refusal(model)
    assert is_untouched(model.with_name("out"))


def test_pickled_weights_are_not_read(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / INDEX]:
        path.unlink()
    torch.save({"weight": torch.ones(1)}, model / "pytorch_model.bin")
    message = refusal(model)
    assert f"{model} holds no .safetensors file (pickled weights are not read)" in message
    assert "pytorch_model.bin" in message
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("name", [DOWN, NORM], ids=["in a block", "outside the blocks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_names_its_tensor(name: str, value: float, model: Path) -> None:
    change(model, name, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"{model}: the tensor {name} holds NaN or infinite values" in refusal(model)


def test_a_tensor_of_another_shape_names_both_shapes(model: Path) -> None:
    change(model, DOWN, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :64].clone()}))
    needed = "where the model's configuration needs [48, 80]"
    assert refusal(model) == f"{model}: tensor {DOWN} has shape [48, 64] {needed}"
    assert is_untouched(model.with_name("out"))


def test_a_missing_tensor_is_named(model: Path) -> None:
    change(model, DOWN, lambda tensors: tensors.pop(DOWN))
    assert refusal(model) == f"{model} lacks 1 tensors, the first is {DOWN}"
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no_such_model"}', "[]"])
def test_a_model_without_a_readable_configuration_is_refused(content: str | None, model: Path) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    assert f"{model} holds no readable config.json" in refusal(model)
    assert is_untouched(model.with_name("out"))


def test_a_model_of_another_kind_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "clip"}')
    assert f"{model} is no causal language model" in refusal(model)


def test_a_quantized_model_is_not_quantized_again(original: Path, tmp_path: Path) -> None:
    out = run(build_recipe(original, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"is already quantized \(dashq\); dashq needs the original weights"):
        run(build_recipe(out, tmp_path / "again"))
    assert is_untouched(tmp_path / "again")


@pytest.mark.parametrize("content", [None, "{"], ids=["none", "garbage"])
def test_a_model_without_a_readable_tokenizer_is_refused(content: str | None, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    assert f"{model} holds no readable tokenizer" in refusal(model)
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("name", ["./absent", "absent", "absent.gguf", "org/absent"])
def test_a_model_that_is_nowhere_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        run(build_recipe(Path(name), tmp_path / "out"))
    assert is_untouched(tmp_path / "out")


def test_weights_beyond_the_numbers_of_the_format_are_refused_by_layer(model: Path) -> None:
    change(model, DOWN, lambda tensors: tensors[DOWN].view(-1)[:1].fill_(1e6))
    message = refusal(model)
    assert message.startswith(f"{DOWN.removesuffix('.weight')}: weights up to 1e+06 do not fit")
