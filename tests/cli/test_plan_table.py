"""The table of a plan fits the terminal, and layers alike share a row."""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dashq import make_plan
from dashq.quantizing.opening import open_model
from dashq_cli.plan_table import kind_table, layer_table
from family_results import FamilyResults
from recipes import build_recipe, mixture_scheme


def test_a_plan_shows_experts_alike_in_one_row_that_fits_the_terminal(families: FamilyResults, tmp_path: Path) -> None:
    overrides = [
        {"match": r".*\.1\..*down_proj\.2", "bits": 4},
        {"match": r".*\.2\..*gate_up_proj\.1", "skip": True},
    ]
    recipe = build_recipe(families.model("mixtral"), tmp_path / "out", scheme=mixture_scheme(), overrides=overrides)
    plans = make_plan(recipe, open_model(recipe).layers())
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(layer_table(plans, 80))
    assert all(len(line) <= 80 for line in console.export_text(clear=False).splitlines())
    text = re.sub(r"\.\s*\n\s+", ".", console.export_text())
    rows = {" ".join(line.split()[:-6]): line.split()[-6:] for line in text.splitlines() if "model.layers" in line}
    names = [name.rpartition("experts.")[2] for name in rows if "experts" in name]
    assert names == [
        *("gate_up_proj.0 … 3", "down_proj.0 … 3"),
        *("gate_up_proj.0 … 3", "down_proj.0 … 1", "down_proj.2", "down_proj.3"),
        *("gate_up_proj.0", "gate_up_proj.2 … 3", "down_proj.0 … 3"),
    ]
    assert sum(int(cells[-2].replace(",", "")) for cells in rows.values()) == sum(plan.bytes for plan in plans)


def shown(table: Table) -> list[str]:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_layers_alike_share_a_row_with_their_blocks_and_bytes(families: FamilyResults, tmp_path: Path) -> None:
    overrides = [
        {"match": r".*\.[02]\..*q_proj", "bits": 4},
        {"match": r".*\.1\..*q_proj", "skip": True},
        {"match": r".*\.1\..*down_proj\.2", "bits": 4},
    ]
    recipe = build_recipe(families.model("mixtral"), tmp_path / "out", scheme=mixture_scheme(), overrides=overrides)
    plans = make_plan(recipe, open_model(recipe).layers())
    lines = shown(kind_table(plans))
    assert lines[0].endswith("bits/")
    assert " ".join(lines[1].split()) == "layers of model.layers.* in blocks override shape bits group size weight"
    rows = [line.split() for line in lines[2:]]
    names = [row[0] for row in rows]
    assert names[:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert names[-2:] == ["mlp.experts.down_proj.*"] * 2
    assert [row[1:4] for row in rows if "q_proj" in row[0]] == [["0,", "2", "1"]]
    assert [row[1:3] for row in rows if "down_proj" in row[0]] == [["0–2", "–"], ["1", "3"]]
    for row in rows:
        kind = re.compile(re.escape(f"model.layers.*.{row[0]}").replace(r"\*", r"\d+"))
        own = [plan for plan in plans if kind.fullmatch(plan.layer.name) and str(plan.scheme.bits) == row[-5]]
        assert row[-3:-1] == [f"{sum(plan.bytes for plan in own) / 1e6:.1f}", "MB"]


def test_a_plan_without_overrides_has_no_column_for_them(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    lines = shown(kind_table(make_plan(recipe, open_model(recipe).layers())))
    assert "override" not in lines[1]
    assert lines[2].split() == ["self_attn.q_proj", "0–2", "48×48", "3", "16", "0.0", "MB", "5.000"]
    assert len(lines) == 2 + 7
