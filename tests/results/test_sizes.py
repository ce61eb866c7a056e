"""The bytes of a model before and after are those of its files, by what holds them."""

from dataclasses import replace
from pathlib import Path

import pytest

from dashq.quantizing.opening import open_model
from dashq.results.report import read_report
from dashq.results.sizes import original_bytes, parts
from family_results import FamilyResults
from pages import finished
from recipes import build_recipe


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "mixtral"])
def test_the_originals_bytes_are_those_of_its_tensors(family: str, families: FamilyResults, tmp_path: Path) -> None:
    model = open_model(build_recipe(families.model(family), tmp_path / "out"))
    sizes = original_bytes(model, model.layers())
    on_disk = (families.model(family) / "model.safetensors").stat().st_size
    assert 0.9 * on_disk < sum(sizes.values()) < on_disk  # which has a header
    assert sizes["layers"] == 4 * sum(layer.weights for layer in model.layers())
    assert sizes["embeddings"] == 4 * 320 * 48
    assert sizes["head"] == (0 if family == "llama" else 4 * 320 * 48)
    assert sizes["others"] > 0


def test_the_parts_of_a_result_add_up_to_its_files(result: Path) -> None:
    report = read_report(result)
    own = parts(report)
    assert [part.name for part in own] == [
        "codes of quantized layers",
        "their scales and offsets",
        "embeddings",
        "norms and others",
    ]
    assert sum(part.after for part in own) == pytest.approx(report.totals.bytes_on_disk, rel=0.1)  # files have headers
    assert sum(part.before or 0 for part in own) == sum(report.original.values())


def test_what_a_format_rewrites_is_one_part() -> None:
    report = finished().report
    rewritten = replace(report, totals=replace(report.totals, bytes_on_disk=10_000_000))
    packed = sum(layer.bytes for layer in report.layers)
    assert parts(rewritten)[-1].name == "not quantized"
    assert parts(rewritten)[-1].after == 10_000_000 - packed
    unknown = parts(replace(report, original={}))
    assert [part.before for part in unknown] == [None] * len(unknown)
