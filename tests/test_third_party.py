"""A stranger's package becomes part of dashq by being installed, and by nothing else."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashq_cli.plugins import Kind, app
from pico import pico_model
from recipes import small_recipe, write_recipe

HERE = Path(__file__).parent
PACKAGE = HERE / "thirdparty" / "dashq-clipped"
GALLERY = sorted((HERE.parent / "examples" / "plugins").iterdir())
# One process for all commands: most of its time goes into importing torch.
LIST_AND_RUN = """
import sys
from dashq_cli.app import app
app(["plugins", "list"], standalone_mode=False)
for recipe in sys.argv[1:]:
    app(["run", recipe], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies, so that building leaves nothing behind: packages of strangers, and one of each kind just begun."""
    folder = tmp_path_factory.mktemp("packages")
    for package in (PACKAGE, *GALLERY):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in Kind:
        new = ["new", f"begun_{kind}", "--kind", kind, "--folder", str(folder)]
        assert CliRunner().invoke(app, new).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def python(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that borrows all packages of this one and has those installed.

    Those just begun are installed to be edited, without a network and without the package that this usually takes.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    [site_packages] = folder.rglob("site-packages")
    (site_packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if Path(path).is_dir()))
    install = ["pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    install += ["--no-deps", "--no-build-isolation"]
    without_editables = folder / "without"
    without_editables.mkdir()
    (without_editables / "editables.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(without_editables)}
    for package in packages.iterdir():
        if package.name.startswith("dashq-begun"):
            install.append("--editable")
        install.append(str(package))
    subprocess.run([sys.executable, "-m", *install], check=True, env=environment)
    return python


def test_without_installation_there_is_no_such_plugin() -> None:
    assert importlib.util.find_spec("dashq_clipped") is None


def test_they_are_listed_and_recipes_run_with_them(python: Path, tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model")
    recipe = small_recipe(model, tmp_path / "out")
    recipe["scheme"] |= {"estimator": {"name": "clipped", "limit": 2.0}}
    of_the_gallery = small_recipe(model, tmp_path / "gallery")
    of_the_gallery["scheme"] |= {
        "estimator": "spatial_sign",
        "grouper": {"name": "by_magnitude", "size": 16},
        "solver": {"name": "stochastic", "draws": 2},
    }
    recipes = [
        write_recipe(tmp_path / "recipe.yaml", recipe),
        write_recipe(tmp_path / "gallery.yaml", of_the_gallery),
    ]
    command = [str(python), "-c", LIST_AND_RUN, *map(str, recipes)]
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    assert re.search(r"^clipped .*?^ +\S+ · limit=6\.0 *$", output, re.MULTILINE | re.DOTALL)
    assert re.search(r"^begun_router .*?^ +\S+ · share=0\.1 *$", output, re.MULTILINE | re.DOTALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {layer["estimator"] for layer in report["layers"]} == {"clipped"}
    gallery = json.loads((tmp_path / "gallery" / "report.json").read_text())
    assert {layer["solver"] for layer in gallery["layers"]} == {"stochastic"}


def test_their_own_tests_pass_unchanged(python: Path, packages: Path) -> None:
    command = [str(python), "-m", "pytest", "-q", "--import-mode=importlib"]
    outcome = subprocess.run(command, cwd=packages, text=True, stdout=subprocess.PIPE)
    assert (outcome.returncode, "16 passed" in outcome.stdout) == (0, True), outcome.stdout
