"""The files of a model's own code are those that its configurations name, and all that these import."""

import json
from pathlib import Path

import pytest

from dashq import CheckpointError
from dashq.model.code import code_files
from dashq.model.location import Location


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.with_suffix(".py").write_text(content)
    return folder


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in code_files(Location(folder))]


def configure(folder: Path, name: str, auto_map: object) -> None:
    (folder / name).write_text(json.dumps({"auto_map": auto_map}))


def test_no_configuration_names_code_and_none_is_taken(tmp_path: Path) -> None:
    write(tmp_path, modeling="x = 1", train="x = 2")
    (tmp_path / "config.json").write_text("{}")
    assert not names(tmp_path)


def test_all_configurations_and_all_relative_imports_count(tmp_path: Path) -> None:
    write(
        tmp_path,
        modeling="from .layers import x\nfrom . import rope, absent\nimport torch\nimport train",
        layers="def late():\n    from .parts.norm import y",
        parts__norm="from ..deep import z",
        deep="",
        rope="from .layers import circle",
        tokenizing="",
        processing="",
        train="",
        custom_generate__generate="from .helper import h",
        custom_generate__helper="",
    )
    configure(tmp_path, "config.json", {"AutoModel": "modeling.Own", "AutoConfig": "org/other--configuration.Own"})
    configure(tmp_path, "tokenizer_config.json", {"AutoTokenizer": ["tokenizing.Own", None]})
    configure(tmp_path, "preprocessor_config.json", {"AutoProcessor": "processing.Own"})
    assert names(tmp_path) == [
        "custom_generate/generate.py",
        "custom_generate/helper.py",
        "deep.py",
        "layers.py",
        "modeling.py",
        "parts/norm.py",
        "processing.py",
        "rope.py",
        "tokenizing.py",
    ]


def test_links_out_of_the_folder_and_names_that_leave_it_are_no_code_of_the_model(tmp_path: Path) -> None:
    model = write(tmp_path / "model", modeling="from ..outside import x\nfrom ....far import y")
    write(tmp_path, outside="secret = 1")
    (model / "linked.py").symlink_to(tmp_path / "outside.py")
    configure(model, "config.json", {"AutoModel": "modeling.Own", "AutoConfig": "linked.Own", "AutoX": "...outside.X"})
    assert names(model) == ["modeling.py"]


@pytest.mark.parametrize("content", ["null", "[]", "{", '{"auto_map": 1}', "[" * 100_000])
def test_configurations_that_are_none_name_no_code(content: str, tmp_path: Path) -> None:
    write(tmp_path, modeling="")
    (tmp_path / "config.json").write_text(content)
    assert not names(tmp_path)


def test_code_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    write(tmp_path, modeling="def (")
    configure(tmp_path, "config.json", {"AutoModel": "modeling.Own"})
    with pytest.raises(CheckpointError, match=r"modeling\.py, code of the model, cannot be parsed: "):
        names(tmp_path)
