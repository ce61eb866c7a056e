"""A stranger's package becomes part of dashq by being installed, and by nothing else."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashq_cli.plugins import app
from pico import pico_model
from recipes import small_recipe, write_recipe

PACKAGE = Path(__file__).parent / "thirdparty" / "dashq-clipped"
# One process for both commands: most of its time goes into importing torch.
LIST_AND_RUN = """
import sys
from dashq_cli.app import app
app(["plugins", "list"], standalone_mode=False)
app(["run", sys.argv[1]], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies, so that building leaves nothing behind: a package of a stranger, and one just begun."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(PACKAGE, folder / PACKAGE.name)
    assert CliRunner().invoke(app, ["new", "begun", "--kind", "router", "--folder", str(folder)]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def python(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that borrows all packages of this one and has those two installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    [site_packages] = folder.rglob("site-packages")
    (site_packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if Path(path).is_dir()))
    install = ["pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    install += ["--no-deps", "--no-build-isolation", *map(str, packages.iterdir())]
    subprocess.run([sys.executable, "-m", *install], check=True)
    return python


def test_without_installation_there_is_no_such_plugin() -> None:
    assert importlib.util.find_spec("dashq_clipped") is None


def test_they_are_listed_and_a_recipe_runs_with_one(python: Path, tmp_path: Path) -> None:
    recipe = small_recipe(pico_model("llama", tmp_path / "model"), tmp_path / "out")
    recipe["scheme"] |= {"estimator": {"name": "clipped", "limit": 2.0}}
    command = [str(python), "-c", LIST_AND_RUN, str(write_recipe(tmp_path / "recipe.yaml", recipe))]
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    assert re.search(r"^clipped .*?^ +\S+ · limit=6\.0 *$", output, re.MULTILINE | re.DOTALL)
    assert re.search(r"^begun .*?^ +\S+ · share=0\.1 *$", output, re.MULTILINE | re.DOTALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {layer["estimator"] for layer in report["layers"]} == {"clipped"}


def test_their_own_tests_pass_unchanged(python: Path, packages: Path) -> None:
    command = [str(python), "-m", "pytest", "-q", "--import-mode=importlib"]
    outcome = subprocess.run(command, cwd=packages, text=True, stdout=subprocess.PIPE)
    assert (outcome.returncode, "2 passed" in outcome.stdout) == (0, True), outcome.stdout
