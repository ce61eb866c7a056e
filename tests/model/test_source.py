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
from dashq import CheckpointError, run
from dashq.model.source import SAFETENSORS_DTYPES, Shards
from dashq.quantizing.opening import open_model
from dashq.results.events import BlockDone, Event
from recipes import build_recipe


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


def test_missing_shards_are_named_in_one_line(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][DOWN] = "two\nlines"
    (model / INDEX).write_text(json.dumps(index))
    assert re.search(r"lacks 1 of \d+ shards: two lines$", refusal(model))


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
def test_an_index_that_is_garbage_is_named_with_what_it_should_hold(content: bytes, model: Path) -> None:
    (model / INDEX).write_bytes(content)
    message = refusal(model)
    assert message.startswith(f"{model / INDEX} is not a readable index of shards: ")
    reasons = (
        "Expecting property name",
        "not UTF-8",
        "not a mapping",
        "it needs a mapping `weight_map` from the names",
    )
    assert any(reason in message for reason in reasons)
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


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"weight_map": null}'], ids=["nested", "null"])
def test_an_index_that_is_no_map_is_named_in_one_line(content: bytes, model: Path) -> None:
    (model / INDEX).write_bytes(content)
    message = refusal(model)
    assert message.startswith(f"{model / INDEX} is not a readable index of shards: ")
    assert "\n" not in message


def write_raw(path: Path, header: str, count: int) -> None:
    """A safetensors file with a header as it is, and as many bytes behind it."""
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))


def test_a_tensor_that_a_header_names_twice_is_refused(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    write_raw(tmp_path / "model.safetensors", f"{{{entry}, {entry}}}", 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is .* its header names a 2 times"):
        Shards(tmp_path)


def test_a_type_that_is_not_known_is_named_with_its_tensor(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}'
    write_raw(tmp_path / "model.safetensors", f"{{{entry}}}", 2)
    with pytest.raises(CheckpointError, match=r"the tensor a is of type F4, which cannot be read"):
        Shards(tmp_path)


@pytest.mark.parametrize("dtype", sorted(SAFETENSORS_DTYPES))
def test_every_type_is_read_whole_and_by_the_slice(dtype: str, tmp_path: Path) -> None:
    numbers = torch.randint(0, 255, (3, 4 * SAFETENSORS_DTYPES[dtype].itemsize), dtype=torch.uint8)
    numbers = numbers.clamp_max(1) if dtype == "BOOL" else numbers
    header = f'{{"a": {{"dtype": "{dtype}", "shape": [3, 4], "data_offsets": [0, {numbers.numel()}]}}}}'
    write_raw(tmp_path / "model.safetensors", header, 0)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(numbers.numpy().tobytes())
    handle = Shards(tmp_path).lazy(["a"])["a"]
    assert handle[...].view(torch.uint8).equal(numbers)
    assert (handle[...].dtype, handle[...].shape) == (SAFETENSORS_DTYPES[dtype], (3, 4))
    assert handle[2].view(torch.uint8).equal(numbers[2])


def test_tensors_without_numbers_and_without_axes_are_read(tmp_path: Path) -> None:
    tensors = {"none": torch.empty(0, 4), "one": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert {key: tensor.shape for key, tensor in read_all(tmp_path).items()} == {"none": (0, 4), "one": ()}
    assert read_all(tmp_path)["one"] == 3


@pytest.mark.parametrize("keep", [None, 1000], ids=["gone", "cut"])
def test_a_file_that_is_cut_or_deleted_while_it_is_read_is_named(keep: int | None, model: Path, tmp_path: Path) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out"))
    shard = shard_of(model, DOWN)
    with opened.block(0):
        pass
    if keep is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as error, opened.block(1):
        pass
    words = "cannot be read any more" if keep is None else "was cut while it was read"
    assert str(error.value).startswith(f"{shard} {words}")
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_within_a_run_loses_nothing(whole_model: Path, model: Path, tmp_path: Path) -> None:
    shard, other = shard_of(model, "model.layers.2.mlp.up_proj.weight"), tmp_path / "kept"
    out = tmp_path / "out"

    def cut(event: Event) -> None:
        if isinstance(event, BlockDone) and event.index == 1:
            shutil.move(shard, other)

    with pytest.raises(CheckpointError, match=re.escape(f"{shard} cannot be read any more")):
        run(build_recipe(model, out), cut)
    shutil.move(other, shard)
    run(build_recipe(model, out))
    undisturbed = run(build_recipe(model, tmp_path / "undisturbed"))
    assert load_file(out / "model.safetensors").keys() == load_file(undisturbed / "model.safetensors").keys()
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
