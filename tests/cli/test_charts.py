"""The figures of an analysis show its numbers, each layer in its place, and the same figure is the same file."""

import math
from pathlib import Path

import numpy
import pytest
from matplotlib.figure import Figure

from analyses import choice, measured
from dashq.measuring.analysis import LayerAnalysis
from dashq.measuring.noise import SignalToNoise
from dashq_cli import charts

NOISE = SignalToNoise(batches=3, diagonal=(1.0, 2.0, 3.0, 4.0, 5.0), off_diagonal=(0.1, 0.2, 0.3, 0.4, 0.5))
LAYERS = [
    measured("model.layers.0.mlp.up_proj", {3: 0.001, 2: 0.004}),
    measured("model.layers.0.mlp.experts.down_proj.0", {3: 0.002, 2: 0.01}, expert=0),
    measured("model.layers.0.mlp.experts.down_proj.10", {3: 0.003, 2: 0.02}, expert=10),
    measured("model.layers.2.mlp.up_proj", {3: 0.005, 2: 0.008}),
]


def maps(figure: Figure) -> dict[str, list[list[float]]]:
    """The numbers of each map by its title; None for what is not there."""
    return {
        axes.get_title(loc="left"): numpy.ma.filled(numpy.ma.asarray(axes.images[0].get_array()), numpy.nan).tolist()
        for axes in figure.axes
        if axes.images
    }


def test_a_map_for_each_number_of_bits_has_blocks_as_columns_and_experts_added_up() -> None:
    figure = charts.sensitivity(LAYERS)
    absent = pytest.approx(math.nan, nan_ok=True)
    assert maps(figure) == {
        "2 bits": [[pytest.approx(4), absent, pytest.approx(8)], [pytest.approx(30), absent, absent]],
        "3 bits": [[pytest.approx(1), absent, pytest.approx(5)], [pytest.approx(5), absent, absent]],
    }
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["mlp.up_proj", "mlp.experts.down_proj"]


def test_all_maps_share_one_scale_of_colours() -> None:
    norms = [axes.images[0].norm for axes in charts.sensitivity(LAYERS).axes if axes.images]
    assert {(norm.vmin, norm.vmax) for norm in norms} == {(1, 30)}


def test_groups_are_those_of_the_scheme() -> None:
    layer = measured("model.layers.0.mlp.up_proj", {3: 0.001})
    both = layer.model_copy(update={"choices": (*layer.choices, choice(3, 0.5, "channel"), choice(2, 0.7, "channel"))})
    assert maps(charts.sensitivity([both])) == {"3 bits": [[pytest.approx(1)]]}


def test_a_block_is_that_of_the_first_number_in_a_name_of_its_own() -> None:
    layers = [measured("model.mamba2.layers.1.up_proj", {2: 0.001}), measured("head", {2: 0.002})]
    assert maps(charts.sensitivity(layers)) == {
        "2 bits": [
            [pytest.approx(math.nan, nan_ok=True), pytest.approx(1)],
            [pytest.approx(2), pytest.approx(math.nan, nan_ok=True)],
        ]
    }


def test_layers_that_cost_nothing_are_drawn_too() -> None:
    figure = charts.sensitivity([measured("model.layers.0.mlp.up_proj", {2: 0.0})])
    assert maps(figure) == {"2 bits": [[pytest.approx(math.nan, nan_ok=True)]]}
    figure.draw_without_rendering()


def test_two_boxes_for_each_layer_show_the_quantiles_of_its_noise() -> None:
    layers = [measured("a", {2: 0.1}, noise=NOISE), measured("b", {2: 0.1}), measured("c", {2: 0.1}, noise=NOISE)]
    axes = charts.noise(layers).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    boxes = [patch.get_path().vertices for patch in axes.patches]
    places = [((box[:, 0].min(), box[:, 0].max()), round(float(box[:, 1].mean()))) for box in map(numpy.asarray, boxes)]
    assert sorted({place for _, place in places}) == [0, 2]  # b has none
    assert {edges for edges, _ in places} == {(2.0, 4.0), (0.2, 0.4)}
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("layers", [[measured("a", {2: 0.1})], [measured("a", {2: 0.1}, noise=NOISE)]])
def test_a_figure_of_noise_is_drawn_whether_any_was_measured_or_not(layers: list[LayerAnalysis]) -> None:
    charts.noise(layers).draw_without_rendering()


@pytest.mark.parametrize("name", ["figure.svg", "figure.png"])
def test_the_same_figure_is_the_same_file(name: str, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        charts.save(charts.sensitivity(LAYERS), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")


def test_a_sweep_shows_its_members_by_size_and_quality_and_joins_the_best() -> None:
    points = [("a", 2_000_000, 0.5), ("b", 1_000_000, 1.0), ("c", 2_500_000, 0.7), ("d", 3_000_000, 0.25)]
    axes = charts.quality(points).axes[0]
    offsets = numpy.asarray(axes.collections[0].get_offsets()).tolist()
    assert offsets == [[2, 0.5], [1, 1], [2.5, 0.7], [3, 0.25]]
    assert numpy.asarray(axes.lines[0].get_xydata()).tolist() == [[1, 1], [2, 0.5], [3, 0.25]]  # c is beaten by a
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d"]
    assert axes.get_yscale() == "log"
    assert charts.quality([("a", 1, 0.0)]).axes[0].get_yscale() == "linear"  # of a result that differs in nothing
