"""Embeddings and head are layers with a role; one matrix that is both is one layer, and counts once."""

from pathlib import Path
from typing import Any

import pytest

from dashq.model.decoder import Model
from dashq.model.outside import outside_layers, parameter_count
from dashq.quantizing.opening import open_model
from pico import pico_model
from recipes import build_recipe

VOCABULARY, WIDTH = 320, 48  # those of `pico.SMALL`


def opened(family: str, folder: Path) -> Model:
    return open_model(build_recipe(pico_model(family, folder / "model"), folder / "out"))


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("llama", {"model.embed_tokens": "tied"}),
        ("llama-untied-biased", {"model.embed_tokens": "embeddings", "lm_head": "head"}),
        ("gpt2", {"transformer.wte": "tied"}),
        ("mixtral", {"model.embed_tokens": "embeddings", "lm_head": "head"}),
    ],
)
def test_their_roles_are_those_of_the_model(family: str, roles: dict[str, str], tmp_path: Path) -> None:
    model = opened(family, tmp_path)
    layers = outside_layers(model.network)
    assert {layer.name: layer.role for layer in layers} == roles
    assert {(layer.rows, layer.columns, layer.block) for layer in layers} == {(VOCABULARY, WIDTH, "")}
    assert model.all_layers() == (*model.layers(), *layers)
    assert {layer.role for layer in model.layers()} == {"linear"}


def test_embeddings_of_each_block_have_a_role_of_their_own(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size_per_layer_input": 32, "num_hidden_layers": 2}
    model = open_model(build_recipe(pico_model("gemma4", tmp_path / "model", **sizes), tmp_path / "out"))
    layers = outside_layers(model.network)
    assert {layer.name: (layer.role, layer.columns) for layer in layers} == {
        "model.embed_tokens": ("tied", WIDTH),
        "model.embed_tokens_per_layer": ("per_layer", 64),
    }
    assert [layer.is_looked_up for layer in layers] == [False, True]


def test_embeddings_of_each_block_for_other_tokens_are_left_alone(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size_per_layer_input": 32, "num_hidden_layers": 2}
    path = pico_model("gemma4", tmp_path / "model", vocab_size_per_layer_input=310, **sizes)
    model = open_model(build_recipe(path, tmp_path / "out"))
    assert [layer.role for layer in outside_layers(model.network)] == ["tied"]


def test_a_tied_matrix_counts_once(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    inside = sum(layer.weights for layer in model.layers())
    norms = 7 * WIDTH  # two in each of three blocks, and the last
    assert parameter_count(model.network) == inside + norms + VOCABULARY * WIDTH
