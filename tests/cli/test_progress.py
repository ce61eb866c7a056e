"""The summary of a run shows how tokens spread over the experts of each mixture."""

import io
import json
from itertools import pairwise
from statistics import median

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dashq.results.events import BlockDone, PhaseBegun, RunStarted, Tuning
from dashq.results.tuned import TuningCheck
from dashq_cli.progress import ProgressBar, bars, print_summary
from family_results import FamilyResults


def test_the_report_and_the_summary_tell_the_tokens_of_every_expert(families: FamilyResults) -> None:
    folder = families.result("mixtral")
    report = json.loads((folder / "report.json").read_text())
    mixtures = report["totals"]["mixtures"]
    assert [mixture["name"] for mixture in mixtures[:2]] == [
        "model.layers.0.mlp.experts.gate_up_proj.*",
        "model.layers.0.mlp.experts.down_proj.*",
    ]
    assert all(sum(mixture["tokens"]) == 2 * 3 * 40 for mixture in mixtures)
    starved = [mixture for mixture in mixtures if mixture["starved"] > 0.25]
    assert starved
    console = Console(record=True, width=80, file=io.StringIO())
    print_summary(console, folder)
    lines = console.export_text().splitlines()
    for mixture in mixtures[::2]:  # once for both stacks
        name = mixture["name"].removesuffix(".gate_up_proj.*")
        (row,) = [line for line in lines if line.startswith(f"{name} ")]
        assert row.split()[1:4] == [str(f(mixture["tokens"])) for f in (min, lambda tokens: int(median(tokens)), max)]
        assert row.rstrip().endswith(bars(mixture["tokens"], width=18).rstrip())
        share = sum(tokens < 64 for tokens in mixture["tokens"]) / 4
        warning = f"warning {name}: {share:.0%} of the experts were sent fewer than 64"
        warnings = [line.rstrip() for line in lines if line.startswith(f"warning {name}")]
        assert warnings == [warning] * (share > 0.25)


@given(tokens=st.lists(st.integers(0, 10**6), min_size=1, max_size=300), width=st.integers(1, 64))
def test_the_chart_has_room_for_all_experts(tokens: list[int], width: int) -> None:
    chart = bars(tokens, width)
    assert len(chart) <= width
    if len(tokens) <= width:
        assert [bar == " " for bar in chart] == [count == 0 for count in tokens]
        assert all(chart[a] <= chart[b] for a, b in pairwise(sorted(range(len(tokens)), key=tokens.__getitem__)))


def test_the_bar_says_what_is_elapsed_and_what_is_left_and_no_number_that_is_not_known() -> None:
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    with ProgressBar(console, "quantizing blocks") as bar:
        pass
    first = console.export_text()
    assert "?" not in first
    assert "elapsed" in first
    assert "left" not in first
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    with ProgressBar(console, "quantizing blocks") as bar:
        bar.hear(RunStarted(30, 210, 4096, "on cpu", ()))
        bar.hear(PhaseBegun("compiling kernels"))
        bar.hear(BlockDone("model.layers.0", 0))
    text = console.export_text()
    assert " 1/30 " in text
    assert "quantizing blocks on cpu" in text
    assert "compiling" not in text


def test_the_bar_says_so_while_kernels_are_compiled() -> None:
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    with ProgressBar(console, "quantizing blocks") as bar:
        bar.hear(RunStarted(30, 210, 4096, "on cpu", ()))
        bar.hear(PhaseBegun("compiling kernels"))
    text = console.export_text()
    assert "compiling kernels" in text
    assert " 0/30 " in text
    assert "left" not in text


def test_the_bar_counts_a_tuners_steps_anew_and_tells_the_divergence_so_far() -> None:
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    with ProgressBar(console, "reading blocks of the original") as bar:
        bar.hear(RunStarted(30, 210, 4096, "on cpu", ()))
        bar.hear(BlockDone("model.layers.0", 0))
        for step, divergence in ((0, 0.5), (7, 0.25)):
            bar.hear(Tuning(TuningCheck(step=step, divergence=divergence, loss=None), 60))
    text = console.export_text()
    assert "tuning, divergence 0.250" in text
    assert " 7/60 " in text
