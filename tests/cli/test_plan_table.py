"""The table of a plan fits the terminal, and layers alike share a row."""

import io
import re
from pathlib import Path

from rich.console import Console

from commands import call
from dashq import make_plan
from dashq.pipeline import open_model
from dashq_cli.plan_table import plan_table
from family_results import FamilyResults
from recipes import build_recipe, mixture_scheme, small_recipe, small_scheme, write_recipe


def test_a_plan_shows_experts_alike_in_one_row_that_fits_the_terminal(families: FamilyResults, tmp_path: Path) -> None:
    overrides = [
        {"match": r".*\.1\..*down_proj\.2", "bits": 4},
        {"match": r".*\.2\..*gate_up_proj\.1", "skip": True},
    ]
    recipe = build_recipe(families.model("mixtral"), tmp_path / "out", scheme=mixture_scheme(), overrides=overrides)
    plans = make_plan(recipe, open_model(recipe).layers())
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(plan_table(plans, 80))
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


def test_the_plan_warns_of_fused_layers_that_differ(wide_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        wide_model,
        tmp_path / "out",
        scheme=small_scheme(64, bits=4),
        overrides=[{"match": ".*layers.0.self_attn.v_proj", "bits": 8}],
        serializer="compressed-tensors",
    )
    outcome = call("plan", write_recipe(tmp_path / "recipe.yaml", recipe))
    assert outcome.code == 0, outcome.errors
    text = " ".join(outcome.output.split())
    assert text.count("runtimes that fuse these layers want them quantized alike") == 1
    assert "model.layers.0.self_attn.v_proj 8 bits in groups of 64" in text
