"""A run goes on only with what it began with: source, text, versions, device and type, and what it wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dashq.results.fingerprint
import dashq.results.shards
from dashq import OutputError, Recipe, run
from dashq.calibration.tokens import draw
from dashq.measuring.choosing import choices_for, stored
from dashq.quantizing.opening import open_model
from dashq.results.fingerprint import content_digest, differences, file_inputs, inputs_of, tensor_digest
from interruptions import Interruption, after_layers, contents, weights
from recipes import build_recipe, small_scheme


@pytest.fixture
def source(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model, to be changed, and pieces as small as parts."""
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)
    return shutil.copytree(model, tmp_path / "model")


def text_file(tmp_path: Path, words: str) -> dict[str, Any]:
    """A calibration text in a local file."""
    (tmp_path / "text.txt").write_text(f"{words} again and again, " * 200)
    return {"dataset": str(tmp_path / "text.txt"), "samples": 3, "sequence_length": 40}


def plain_recipe(source: Path, tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe with that text and the quickest solver."""
    text, scheme = text_file(tmp_path, "some words"), small_scheme(solver="rtn")
    return build_recipe(source, tmp_path / "out", calibration=text, scheme=scheme, **changes)


def change_one_number(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def change_the_weights(source: Path) -> None:
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def change_setting(file: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        content = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps(content | {"added": 1}))

    return change


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_the_weights, "file model.safetensors has changed"),
        (change_one_number, "file model.safetensors has changed"),
        (change_setting("config.json"), "file config.json has changed"),
        (change_setting("tokenizer_config.json"), "file tokenizer_config.json has changed"),
        (lambda source: (source / "generation_config.json").unlink(), "file generation_config.json is gone"),
        (lambda source: text_file(source.parent, "other words"), "calibration text has changed"),
    ],
    ids=["weights", "one number", "configuration", "tokenizer", "generation settings", "text"],
)
def test_a_changed_source_or_text_is_refused_by_name(
    change: Callable[[Path], object], difference: str, source: Path, tmp_path: Path
) -> None:
    recipe = plain_recipe(source, tmp_path)
    with pytest.raises(Interruption):
        run(recipe, after_layers(16))
    before = contents(tmp_path / "out")
    change(source)
    with pytest.raises(OutputError) as refusal:
        run(recipe)
    assert str(refusal.value) == (
        f"{tmp_path / 'out'} holds an unfinished run that was made from something else; --overwrite discards it: "
        + difference
    )
    assert contents(tmp_path / "out") == before


def test_overwriting_makes_everything_from_the_changed_source(source: Path, tmp_path: Path) -> None:
    recipe = plain_recipe(source, tmp_path)
    with pytest.raises(Interruption):
        run(recipe, after_layers(16))
    change_the_weights(source)
    run(recipe, overwrite=True)
    assert weights(tmp_path / "out") == weights(run(recipe.model_copy(update={"output": tmp_path / "fresh"})))


def test_changed_versions_types_and_devices_are_named() -> None:
    before = {"version of torch": "2.1", "dtype": "bfloat16", "device": "cpu", "version of dashq-clipped": "1"}
    now = {"version of torch": "2.2", "dtype": "float32", "device": "cuda", "version of other": "2"}
    assert differences(before, now) == [
        "device was cpu and is cuda",
        "dtype was bfloat16 and is float32",
        "version of dashq-clipped is gone",
        "version of other is new",
        "version of torch was 2.1 and is 2.2",
    ]
    assert not differences(before, before)


def test_inputs_hold_versions_of_the_packages_that_plugins_come_from(source: Path, tmp_path: Path) -> None:
    recipe = build_recipe(source, tmp_path / "out", dtype="float32")
    inputs = inputs_of(open_model(recipe), recipe)
    assert {"version of python", "version of torch", "version of transformers", "version of dashq"} <= inputs.keys()
    assert (inputs["device"], inputs["dtype"]) == ("cpu", "float32")
    assert {"file model.safetensors", "file config.json", "file tokenizer.json"} <= inputs.keys()


def test_another_number_of_threads_goes_on_and_is_noted(source: Path, tmp_path: Path) -> None:
    recipe = plain_recipe(source, tmp_path)
    with pytest.raises(Interruption):
        run(recipe, after_layers(16))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(recipe)
    finally:
        torch.set_num_threads(threads)
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert f"computed with {threads} and {threads + 1} threads in turn" in warnings[-1]


def test_a_measurement_is_read_again_only_for_the_same_source_and_text(source: Path, tmp_path: Path) -> None:
    recipe = plain_recipe(source, tmp_path, budget=4)
    run(recipe)

    def is_stored(**changes: str) -> bool:
        model = open_model(recipe)
        tokens = draw(recipe.calibration, model.tokenizer).samples
        return stored(recipe, choices_for(recipe, model), inputs_of(model, recipe, tokens) | changes) is not None

    assert is_stored()
    assert not is_stored(dtype="float8")
    text_file(tmp_path, "other words")
    assert not is_stored()
    text_file(tmp_path, "some words")
    assert is_stored()
    change_one_number(source)
    assert not is_stored()


def test_every_tensor_has_a_digest_of_type_shape_and_values() -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(4) + 1, torch.zeros(0)]
    tensors += [torch.tensor(0.0), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bool)]
    assert len({tensor_digest(tensor) for tensor in tensors}) == len(tensors)
    square = torch.arange(6.0).view(2, 3)
    assert tensor_digest(square.T) == tensor_digest(square.T.contiguous())


def test_a_large_file_is_known_by_its_beginning_its_size_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "large.bin", bytearray(range(256)) * 400

    def digest() -> str:
        path.write_bytes(content)
        return file_inputs([path])["file large.bin"]

    monkeypatch.setattr(dashq.results.fingerprint, "BEGINNING", 1000)
    monkeypatch.setattr(dashq.results.fingerprint, "PIECE", 100)
    digests = [digest()]
    for place in (0, 999, 1100, len(content) - 1):
        content[place] ^= 1
        digests.append(digest())
    content.append(0)
    digests.append(digest())
    assert len(set(digests)) >= 5
    assert digests[-1].startswith(f"{len(content)} bytes ")


def test_a_file_that_came_along_is_known_by_every_byte(tmp_path: Path) -> None:
    content = bytearray(5_000_000)
    (tmp_path / "tokenizer.json").write_bytes(content)
    before = content_digest(tmp_path / "tokenizer.json")
    content[4_567_890] = 1
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert content_digest(tmp_path / "tokenizer.json") != before
