"""The page beside a result: one file that any browser shows, and that takes nothing of what it shows for markup."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from dashq import OutputError
from dashq.results.comparison import read_finished
from dashq.results.judged import Continuation
from dashq.results.page import MARK, page, write_page
from pages import EVIL, Seen, finished, in_browser
from recipes import REGISTRY

FORMATS = REGISTRY.serializers


def data_of(text: str) -> list[dict[str, Any]]:
    """The data for drawings in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    results: list[dict[str, Any]] = json.loads(found[1])["results"]
    return results


def painted(seen: Seen) -> list[int]:
    """The number of colours in each canvas."""
    counts: list[int] = seen.page.evaluate(
        """[...document.querySelectorAll("canvas")].map(canvas => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        })"""
    )
    return counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a result with experts, a budget and a tuner."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_page(path, page([finished(experts=4)], FORMATS))


def test_types_of_a_gguf_file_stand_beside_the_bits() -> None:
    recipe = {"serializer": {"name": "gguf", "three_bits": "IQ3_S"}}
    result = finished(blocks=2, recipe=recipe)
    text = page([result], FORMATS)
    (drawn,) = data_of(text)
    assert drawn["types"] == ["Q2_K"] * 3 + ["IQ3_S"] * 3
    assert "2 bits (Q2_K) in 3, 3 bits (IQ3_S) in 3" in text
    assert '<td class="text">IQ3_S, Q2_K</td>' in text  # of a kind of layer
    assert '<td>3</td><td class="text">IQ3_S</td>' in text  # of one of the worst
    plain = page([finished(blocks=2)], FORMATS)
    assert data_of(plain)[0]["types"] == []
    assert '<th class="text">type</th>' not in plain


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_it_is_drawn_without_a_complaint_or_a_request_on_screens_wide_and_narrow(
    width: int, scheme: str, whole: Path
) -> None:
    with in_browser(whole, width, scheme) as seen:
        assert seen.overflow == 0
        assert all(colours > 2 for colours in painted(seen))
        assert len(painted(seen)) == 3  # layers, bits, experts
        assert seen.page.locator("svg").count() == 2  # budget and tuning
        before = seen.page.locator(".ramp .high").text_content()
        seen.page.get_by_role("button", name="seconds").click()
        assert seen.page.locator(".ramp .high").text_content() != before
        seen.page.locator("[data-draw=layers] canvas").hover(position={"x": 3, "y": 3})
        assert "model.layers.0.self_attn.q_proj\nseconds: 0.5" in seen.page.locator(".tip").text_content()
    assert seen.complaints == []
    assert seen.requests == [whole.as_uri()]


def test_printed_it_is_light_whatever_the_screen_is(whole: Path) -> None:
    ground = "getComputedStyle(document.documentElement).getPropertyValue('--ground').trim()"
    with in_browser(whole, scheme="dark") as seen:
        assert seen.page.evaluate(ground) != "#ffffff"
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate(ground) == "#ffffff"
        assert seen.page.locator(".choice").is_hidden()
        assert seen.page.pdf().startswith(b"%PDF")
    assert seen.complaints == []


def test_twenty_thousand_layers_are_one_page(tmp_path: Path) -> None:
    path = write_page(tmp_path / "report.html", page([finished(blocks=60, experts=333)], FORMATS))
    assert path.stat().st_size < 4e6
    with in_browser(path) as seen:
        assert len(painted(seen)) == 3
        assert seen.page.locator("*").count() < 3000
    assert seen.complaints == []


def test_names_and_texts_of_others_are_shown_and_never_run(tmp_path: Path) -> None:
    result = finished(EVIL, recipe={"model": EVIL, "scheme": {"bits": EVIL}}, base_model=None)
    judgement = result.report.judgement
    assert judgement
    sentence = Continuation(EVIL, EVIL, EVIL)
    layer = replace(result.report.layers[0], name=f"model.layers.0.{EVIL}", fallbacks=(EVIL,))
    report = replace(
        result.report,
        judgement=replace(judgement, continuation=sentence),
        layers=(layer, *result.report.layers[1:]),
        warnings=(EVIL,),
    )
    text = page([replace(result, report=report), replace(result, report=report, name="other")], FORMATS)
    assert "<img" not in text
    assert text.count("</script>") == 2
    path = write_page(tmp_path / "report.html", text)
    with in_browser(path) as seen:
        assert seen.page.title() != "taken"
        assert EVIL in seen.page.locator(".samples").text_content()
    assert seen.complaints == []


def test_it_has_every_figure_of_the_report() -> None:
    result = finished()
    text = unescape(page([result], FORMATS))
    judgement = result.report.judgement
    assert judgement
    for figure in judgement.figures().values():
        assert f"<td>{figure}</td>" in text
    assert all(f"{phase} <b>" in text for phase in result.report.seconds)
    assert "there was a cat" in text
    assert "there was a was" in text
    assert "codes of quantized layers" in text
    (drawn,) = data_of(text)
    layers = result.report.layers
    assert drawn["names"] == [layer.name for layer in layers]
    assert drawn["figures"]["error"] == pytest.approx([layer.error for layer in layers], rel=1e-4)
    assert drawn["figures"]["gamma"] == [0.1] * len(layers)
    assert [drawn["kinds"][kind] for kind in drawn["kind"][:3]] == [layer.name[15:] for layer in layers[:3]]
    assert drawn["budget"]["points"] == [[2.0, 0.5], [3.0, 0.1], [4.0, 0.02]]


@pytest.mark.parametrize("name", FORMATS)
def test_it_tells_how_programs_open_the_format_and_names_no_folder_of_this_machine(name: str) -> None:
    text = unescape(page([finished(base_model=None, recipe={"serializer": {"name": name}})], FORMATS))
    assert FORMATS[name].openings
    for program, code in FORMATS[name].openings.items():
        assert f"{program}</p>" in text
        assert code.removeprefix("$ ").strip().replace("{model}", "out") in text
    assert "dashq chat out" in text
    assert "/home/me" not in text
    assert "text.txt" in text


def test_a_result_that_was_not_judged_tuned_or_measured_has_a_page() -> None:
    text = page([finished(judgement=None, tuned=None, budget=None, original={})], FORMATS)
    assert "was not judged" in text
    assert 'data-draw="tuning"' not in text
    assert 'data-draw="budget"' not in text


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    result = finished()
    layers = (replace(result.report.layers[0], error=float("nan")), *result.report.layers[1:])
    text = page([replace(result, report=replace(result.report, layers=layers))], FORMATS)
    assert data_of(text)[0]["figures"]["error"][0] is None
    with in_browser(write_page(tmp_path / "report.html", text)) as seen:
        assert seen.complaints == []


def test_several_results_become_a_comparison(tmp_path: Path) -> None:
    results = [finished("one"), finished("two", experts=2, recipe={"scheme": {"bits": 3}})]
    text = page(results, FORMATS)
    assert "2 results compared" in text
    assert "<td>2</td><td>3</td>" in text.partition("bits</th>")[2][:40]
    with in_browser(write_page(tmp_path / "comparison.html", text), width=390) as seen:
        assert seen.overflow == 0
        assert seen.page.locator("[data-draw=layers] canvas").count() == 2
        assert seen.page.locator("[data-draw=trade] circle").count() == 2
    assert seen.complaints == []


def test_every_run_writes_one(result: Path) -> None:
    text = (result / "report.html").read_bytes()
    assert MARK in text
    assert text.decode() == page(read_finished([result]), REGISTRY.serializers)


def test_a_file_that_is_no_page_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match=r"report\.html is no page that dashq wrote"):
        write_page(path, page([finished()], FORMATS))
    assert path.read_text() == "<p>mine</p>"
    with pytest.raises(OutputError, match="there is no folder"):
        write_page(tmp_path / "absent" / "report.html", "")
    other = write_page(tmp_path / "other.html", page([finished()], FORMATS))
    assert write_page(other, page([finished("again")], FORMATS)).read_text() != ""
