"""What the documentation says is so: pages are fresh, examples run, tables match the code, links lead somewhere."""

import doctest
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import generate
from dashq import hooks, load_recipe, load_registry, run
from dashq.recipe.recipe import Calibration, Override, Recipe, Scheme
from dashq.results.report import LayerReport, Report
from dashq.strategies import KINDS
from dashq.testing import check_strategy
from dashq.text_source import TextSource
from dashq_cli.app import app
from pico import pico_model
from recipes import build_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]}
FENCE = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"\n]*)")?\n(?P<text>.*?)^```', re.MULTILINE | re.DOTALL
)


def blocks(language: str) -> Iterator[tuple[str, str, str]]:
    """Page, title and text of every block of code in a language."""
    for page, text in PAGES.items():
        for block in FENCE.finditer(text):
            if block["language"] == language:
                yield page, block["title"] or "", block["text"]


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one."""
    return re.split(rf"^#+ {re.escape(heading)}$", PAGES[page], flags=re.MULTILINE)[1].split("\n#")[0]


def table(text: str) -> dict[str, list[str]]:
    """The rows whose first cell is a word of code, by that word."""
    rows = re.findall(r"^\| `([\w.]+)`(.*)\|$", text, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")[1:]] for name, rest in rows}


def first_cells(text: str) -> list[str]:
    """The words of code in the first cells of the last table."""
    cells = re.findall(r"^\| (`.*?) \|", text.rpartition("| --- |")[2], flags=re.MULTILINE)
    return re.findall(r"`(\w+)`", " ".join(cells))


def module(name: str, text: str) -> ModuleType:
    """A block of code as a module that can be imported."""
    made = ModuleType(name)
    exec(compile(text, name, "exec"), vars(made))
    return made


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin of write-a-plugin.md."""
    made = module("dashq_clipped", next(text for _, title, text in blocks("python") if title == "dashq_clipped.py"))
    monkeypatch.setitem(sys.modules, "dashq_clipped", made)
    return made


def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as exit:
        generate.main()
    assert exit.value.code == 0


@pytest.mark.parametrize("page", ["cli.md", "hooks.md", "results.md", "decisions/index.md"])
def test_stale_pages_are_named(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "index.md").write_text("<!-- generated: decisions -->\n<!-- end -->")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate.main()
    text = (tmp_path / page).read_text("utf-8")
    (tmp_path / page).write_text(text.replace("| --- |", "| --- | something else"), "utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit, match=rf"stale: \S*{page}; run"):
        generate.main()


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_and_strategy_is_documented(kind: str) -> None:
    page = PAGES["docs/hooks.md"]
    assert hasattr(hooks, f"dashq_{kind}")
    assert f"## `dashq_{kind}`" in page
    assert f"### The interface `{KINDS[kind].__name__}`" in page
    interface = KINDS[kind]
    members = vars(interface).keys() | interface.__annotations__.keys()
    for member in members:
        documented = (f"#### `{interface.__name__}.{member}`" in page, f"\n{member}: " in page)
        assert any(documented) or member.startswith(("_", "model_")), member
    for name, strategy in getattr(load_registry(), kind).items():
        if strategy.__module__.startswith("dashq_plugins."):
            assert strategy.model_fields.keys() == table(section("docs/hooks.md", f"`{name}`")).keys()


@pytest.mark.parametrize(
    ("model", "heading"),
    [
        (Recipe, "Top level"),
        (Calibration, "`calibration`"),
        (Scheme, "`scheme`"),
        (TextSource, "Text sources"),
        (load_registry().tuners["distill"], "`tuner`"),
    ],
)
def test_every_key_of_a_recipe_is_documented_with_its_default(model: type[BaseModel], heading: str) -> None:
    rows = table(section("docs/recipes.md", heading))
    documented = {key: cells[1] for key, cells in rows.items() if len(cells) == 3}  # type, default, meaning
    expected = {
        key: "required" if field.is_required() else f"`{str(yaml.safe_dump(field.default)).splitlines()[0]}`"
        for key, field in model.model_fields.items()
    }
    if model is Recipe:
        expected["overrides"] = "empty"
    assert documented == expected


def test_every_key_of_an_override_is_documented() -> None:
    assert first_cells(section("docs/recipes.md", "`overrides`")) == list(Override.model_fields)


def test_every_key_of_the_report_is_documented() -> None:
    text = section("docs/formats.md", "`report.json`")
    assert sorted(first_cells(text)) == sorted(field.name for field in fields(LayerReport))
    whole, _, _ = text.partition("An entry of `layers`")
    assert {*first_cells(whole), "totals"} == {field.name for field in fields(Report)}


@pytest.mark.parametrize(
    ("page", "title", "text"), [pytest.param(*block, id=block[1]) for block in blocks("yaml") if block[1]]
)
def test_full_recipes_load(page: str, title: str, text: str, plugin: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    load_recipe(path, load_registry(plugin))
    if (ROOT / title).is_file():  # the page shows a file of the repository
        assert yaml.safe_load(text) == yaml.safe_load((ROOT / title).read_text())


def test_every_shipped_recipe_is_documented() -> None:
    documented = re.findall(r"^\| `(\w+\.yaml)`", section("docs/recipes.md", "Shipped recipes"), re.MULTILINE)
    assert sorted(documented) == sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("page", "text"), [pytest.param(page, text, id=page) for page, _, text in blocks("python") if "@hookimpl" in text]
)
def test_shown_plugins_register_and_keep_their_contract(page: str, text: str) -> None:
    [kind], [name] = (
        re.findall(r"^def dashq_(\w+)", text, re.MULTILINE),
        re.findall(r'^    name = "(\w+)"', text, re.MULTILINE),
    )
    shown = module(f"dashq_{name}", text)
    strategy = getattr(load_registry(shown), kind)[name]
    assert strategy is getattr(shown, strategy.__name__)
    check_strategy(strategy)


def test_the_readme_both_guides_and_plugins_new_show_the_same_estimator(tmp_path: Path) -> None:
    CliRunner().invoke(app, ["plugins", "new", "clipped", "--kind", "estimator", "--folder", str(tmp_path)])
    contract = next(text for _, title, text in blocks("python") if title == "test_contract.py")
    assert (tmp_path / "dashq-clipped" / "test_contract.py").read_text("utf-8") == contract
    written = (tmp_path / "dashq-clipped" / "dashq_clipped.py").read_text("utf-8")
    shown = {page: text for page, _, text in blocks("python") if "ClippedEstimator(Estimator)" in text}
    assert shown == {"README.md": written, "docs/write-a-plugin.md": written, "docs/hooks.md": written}


def test_the_guide_and_plugins_new_show_the_same_tuner(tmp_path: Path) -> None:
    CliRunner().invoke(app, ["plugins", "new", "my_norms", "--kind", "tuner", "--folder", str(tmp_path)])
    [shown] = [text for _, title, text in blocks("python") if title == "dashq_my_norms.py"]
    assert (tmp_path / "dashq-my_norms" / "dashq_my_norms.py").read_text("utf-8") == shown


def test_the_gallery_shows_the_packages_that_the_tests_build() -> None:
    shown = {title: text for page, title, text in blocks("python") if page == "docs/gallery.md"}
    modules = (ROOT / "examples" / "plugins").glob("*/dashq_*.py")
    assert shown == {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in modules}


def test_the_readme_fits_on_a_screen_and_a_half() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120
    assert len(PAGES["README.md"].split()) < 1400


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/decisions/0")])
def test_decisions_have_their_parts(page: str) -> None:
    parts = re.findall(r"^\*\*(\w+)\.\*\*", PAGES[page], re.MULTILINE)
    assert {"Situation", "Decision", "Alternatives", "Consequences"} <= set(parts) <= {*parts, "Figure"}


def test_the_guide_shows_the_package_that_the_tests_install(plugin: ModuleType) -> None:
    shown = {title: text for page, title, text in blocks("python") if page == "docs/write-a-plugin.md"}
    assert list(shown) == ["dashq_clipped.py", "test_contract.py", "dashq_my_norms.py", ""]
    for title in ("dashq_clipped.py", "test_contract.py"):
        assert shown[title] == (ROOT / "tests/thirdparty/dashq-clipped" / title).read_text()
    assert "clipped" in module("example", shown[""]).registry.estimators


def test_a_result_opens_as_the_quickstart_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    run(build_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out" / "smollm2-2bit"))
    monkeypatch.chdir(tmp_path)
    shown = FENCE.finditer(section("docs/quickstart.md", "Open the result"))
    module("example", "".join(block["text"] for block in shown))
    assert "The capital of France is" in capsys.readouterr().out
    assert "quantization_config" not in (tmp_path / "out" / "smollm2-plain" / "config.json").read_text()


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "\n>>> " in text])
def test_examples_with_a_prompt_give_what_they_show(page: str) -> None:
    examples = doctest.DocTestParser().get_doctest(PAGES[page], {}, page, page, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of dashq on any page: the page, and the words behind `dashq`."""
    for page, _, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "dashq" in words:
                yield page, words[words.index("dashq") + 1 :]


@pytest.mark.parametrize(("page", "words"), [pytest.param(*call, id=" ".join(call[1])) for call in commands()])
def test_commands_and_options_exist(page: str, words: list[str]) -> None:
    command = words[: 2 if words[0] == "plugins" else 1]
    result = CliRunner().invoke(app, [*command, "--help"], env={"TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", result.output))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", re.sub(FENCE, "", PAGES[page])):
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target
