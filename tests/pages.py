"""Results that were never run, and pages in a browser, for tests."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dashq.results.comparison import Finished
from dashq.results.judged import Continuation, Judgement
from dashq.results.report import BudgetCurve, Gaps, LayerReport, MixtureReport, Report, Totals
from dashq.results.tuned import Tuned, TuningCheck
from layer_reports import layer_report

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def many_layers(blocks: int, experts: int = 0) -> tuple[LayerReport, ...]:
    """Layers of all kinds, with experts in each block where there are some."""
    layers = []
    for block in range(blocks):
        for number, kind in enumerate(KINDS):
            changes: dict[str, Any] = {"error": 0.01 * (block + 1) + 0.001 * number, "minmax_error": 0.1}
            changes |= {"bits": 2 + block % 3, "bytes": 80 * 48 // 2, "seconds": 0.5, "statistics": {"gamma": 0.1}}
            layers.append(layer_report(f"model.layers.{block}.{kind}", **changes))
        for expert in range(experts):
            name = f"model.layers.{block}.mlp.experts.{expert}.up_proj"
            layers.append(layer_report(name, expert=expert, tokens=100 + expert, error=0.02, minmax_error=0.1))
    return tuple(layers)


def finished(name: str = "out", blocks: int = 4, experts: int = 0, **changes: Any) -> Finished:
    """A result with all that a page can show, with changes of its report."""
    layers = many_layers(blocks, experts)
    weights = sum(layer.layer.weights for layer in layers)
    tokens = tuple(100 + expert for expert in range(experts))
    stacks = [f"model.layers.{block}.mlp.experts.*.up_proj" for block in range(blocks)] if experts else []
    totals = Totals(
        layers=len(layers),
        weights=weights,
        bits_per_weight=2.5,
        bytes_on_disk=40_000_000,
        mean_error=0.02,
        mean_minmax_error=0.1,
        mixtures=tuple(MixtureReport(stack, tokens, (0.0,) * experts, 0.0) for stack in stacks),
        certificate=Gaps(mean_gap=0.001, worst_gap=0.01, groups=10),
    )
    judgement = Judgement(
        tokens=1000,
        held_out=True,
        divergence=0.25,
        divergence_error=0.01,
        agreement=0.8,
        agreement_error=0.02,
        perplexity=12.0,
        perplexity_error=0.5,
        original_perplexity=10.0,
        original_perplexity_error=0.4,
        ratio_error=0.02,
        continuation=Continuation("Once", "there was a cat", "there was a was"),
    )
    checks = tuple(TuningCheck(step=step, divergence=1 / (1 + step), loss=None) for step in range(4))
    report = Report(
        totals=totals,
        seconds={"load": 1.0, "solve": 9.0},
        computed="on cpu in float32",
        versions={"dashq": "0.1.0"},
        chosen=(),
        budget=BudgetCurve(2.5, ((2.0, 0.5), (3.0, 0.1), (4.0, 0.02))),
        original={"layers": 30_000_000, "embeddings": 20_000_000, "head": 0, "others": 20_000},
        judgement=judgement,
        tuned=Tuned(tuner="some_tuner", samples=100, held_out=100, checks=checks),
        layers=layers,
        base_model="org/some-model",
    )
    recipe = {
        "model": "/home/me/private/some-model",
        "output": f"/home/me/private/{name}",
        "calibration": {"dataset": [{"name": "/home/me/private/text.txt"}], "samples": 8},
        "scheme": {"bits": 2, "solver": {"name": "some_solver", "steps": 3}},
        "overrides": [],
        "serializer": {"name": "some_format"},
    }
    changed = {key: value for key, value in changes.items() if key != "recipe"}
    return Finished(name, _replaced(report, changed), recipe | changes.get("recipe", {}))


def _replaced(report: Report, changes: dict[str, Any]) -> Report:
    return Report(**{**vars(report), **changes})


@dataclass
class Seen:
    """A page in a browser, and all that it asked for or complained about while it was there."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        element = "document.documentElement"
        width: int = self.page.evaluate(f"{element}.scrollWidth - {element}.clientWidth")
        return width


@contextmanager
def in_browser(path: Path, width: int = 1200, scheme: str = "light") -> Generator[Seen]:
    """Open a file in headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        seen = Seen(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(path.as_uri())
        yield seen
        browser.close()
