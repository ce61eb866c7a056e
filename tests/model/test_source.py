"""Files of weights that are missing, broken or of another kind are refused by name before anything is written."""

import re
from pathlib import Path

import pytest
import torch

from broken_models import DOWN, INDEX, is_untouched, refusal, shard_of


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
