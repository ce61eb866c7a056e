"""Files of weights that are missing, broken or of another kind are refused by name before anything is written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from broken_models import DOWN, INDEX, is_untouched, refusal, shard_of
from dashq.model.source import Shards


def read_all(model: Path) -> dict[str, Tensor]:
    """Every tensor that is read of a model."""
    shards = Shards(model)
    return {key: handle[...] for key, handle in shards.lazy(list(shards.headers())).items()}


def write_changed(tensors: dict[str, Tensor], path: Path) -> None:
    """Another save of a model, with all weights negated and one that it does not have."""
    changed = {name: -tensor for name, tensor in tensors.items()} | {"stray.weight": torch.ones(2)}
    save_file(changed, path, metadata={"format": "pt"})


def assert_read_as_transformers_reads(model: Path, expected: dict[str, Tensor]) -> None:
    """The same tensors by name, which are those that transformers opens."""
    tensors = read_all(model)
    opened = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.equal(expected[name])
        assert tensor.equal(opened[name])


def test_one_file_of_weights_comes_before_an_index_and_other_files_are_not_read(whole_model: Path, model: Path) -> None:
    tensors = read_all(whole_model)
    for shard in set(json.loads((model / INDEX).read_text())["weight_map"].values()):
        write_changed(load_file(model / shard), model / shard)  # an index and its shards of an earlier save
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_changed(tensors, model / "model_old.safetensors")
    assert_read_as_transformers_reads(model, tensors)


def test_only_the_shards_that_the_index_names_are_read(whole_model: Path, model: Path) -> None:
    tensors = read_all(whole_model)
    write_changed(tensors, model / "consolidated.safetensors")
    write_changed(tensors, model / "model-00001-of-00001.safetensors")
    assert_read_as_transformers_reads(model, tensors)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(whole_model: Path, model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
        path.symlink_to(whole_model / path.name)
    assert_read_as_transformers_reads(model, read_all(whole_model))


def test_a_tensor_that_two_shards_hold_is_refused_with_both_names(model: Path) -> None:
    holder = shard_of(model, DOWN)
    other = next(path for path in sorted(model.glob("*.safetensors")) if path != holder)
    save_file(load_file(other) | {DOWN: load_file(holder)[DOWN] + 1}, other, metadata={"format": "pt"})
    first, second = sorted([holder.name, other.name])
    assert refusal(model) == f"{model}: both {first} and {second} hold {DOWN}"
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("leads", ["../other/{}", "sub/../../other/{}", "{folder}/other/{}"])
def test_a_shard_outside_the_folder_is_refused(leads: str, model: Path) -> None:
    shard = shard_of(model, DOWN)
    (model.parent / "other").mkdir()
    shutil.move(shard, model.parent / "other")
    name = leads.format(shard.name, folder=model.parent)
    (model / INDEX).write_text((model / INDEX).read_text().replace(shard.name, name))
    assert refusal(model) == f"{model / INDEX} names a shard outside its folder: {model / name}"
    assert is_untouched(model.with_name("out"))


def test_weights_under_another_name_are_refused_as_transformers_does(model: Path) -> None:
    (model / INDEX).unlink()
    message = refusal(model)
    assert f"{model} holds neither model.safetensors nor {INDEX}" in message
    assert "model-00001-of-" in message
    assert is_untouched(model.with_name("out"))


def test_a_configuration_that_names_a_file_of_weights_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert f"{model}: `transformers_weights: other.safetensors` of config.json is not supported" in refusal(model)
    assert is_untouched(model.with_name("out"))


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
    assert f"{model} holds neither model.safetensors nor {INDEX}" in message
    assert "pickled weights are not read" in message
    assert "pytorch_model.bin" in message
    assert is_untouched(model.with_name("out"))
