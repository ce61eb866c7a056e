"""What lies beside a model's weights and is no part of them comes with every result as it is, in every format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dashq import run
from dashq.model.location import Location
from dashq.results.carried import carry
from dashq.results.convert import convert
from dashq.runtime.quantizer import build_serializer
from format_results import SCHEMES, FormatResults
from pico import pico_tokenizer
from recipes import build_recipe, small_scheme

# Three tokens end a text, and the settings are of a kind that transformers calls invalid: sampling without sampling.
SETTINGS = {"eos_token_id": [0, 5, 7], "pad_token_id": 3, "do_sample": False, "temperature": 0.6, "unheard_of": [1]}
FILES = {
    "generation_config.json": json.dumps(SETTINGS).encode() + b"\r\n",
    "preprocessor_config.json": b'{"size": 1}',
    "video_preprocessor_config.json": b"no JSON",
    "processor_config.json": b"{}",
    "tokenizer.model": b"\x00\xff",
    "LICENSE": b"do as you like",
    "Licence.txt": b"\xe9",
    "LLAMA_LICENSE.md": b"",
    "NOTICE": b"of somebody",
    "USE_POLICY.md": b"be good",
    "LLAMA-3.1-Community-License.v2": b"for the community",
    "LICENSES/MIT": b"as is",
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "special_tokens_map.json": b'{ "eos_token": "</s>" }',
    "added_tokens.json": b"{}\n",
    "tekken.json": b"{}",
    "modules.json": b"[]",
    "config_sentence_transformers.json": b"{ }",
    "sentence_bert_config.json": b'{"max_seq_length": 77}',
    "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
    "2_Dense/model.safetensors": b"weights behind the decoder",
}


def write_files(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    # As versions of transformers before 5 wrote it; it says the same when it is read, and other bytes when it is saved.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": True, **settings}, indent=7))
    return folder


def carried_files(folder: Path) -> dict[str, bytes]:
    names = [*FILES, "tokenizer.json", "tokenizer_config.json"]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture(scope="session")
def chat_model(results: FormatResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of all formats, with files beside it."""
    return write_files(shutil.copytree(results.model, tmp_path_factory.mktemp("carried") / "model"))


def run_in_format(label: str, model: Path, output: Path) -> Path:
    serializer, bits, size, solver = SCHEMES[label]
    scheme: dict[str, Any] = small_scheme(size, bits=bits, solver=solver)
    return run(build_recipe(model, output, scheme=scheme, serializer=serializer))


@pytest.mark.parametrize(
    "label", ["dashq", "mlx", "metal", "compressed-tensors", "gptq", "dashq-packed-linear", "Q4_K"]
)
def test_every_format_carries_the_files_byte_by_byte(label: str, chat_model: Path, tmp_path: Path) -> None:
    assert carried_files(run_in_format(label, chat_model, tmp_path / "out")) == carried_files(chat_model)


def test_a_conversion_carries_the_files_byte_by_byte(chat_model: Path, tmp_path: Path) -> None:
    native = run_in_format("dashq", chat_model, tmp_path / "native")
    there = convert(native, build_serializer({"name": "mlx"}), tmp_path / "there")
    assert carried_files(there) == carried_files(chat_model)
    assert carried_files(there).keys() > FILES.keys()


def test_a_result_generates_with_the_settings_of_its_model(model: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(model, tmp_path / "model")
    (chat / "generation_config.json").write_text(json.dumps(SETTINGS | {"do_sample": True}))
    result = run(build_recipe(chat, tmp_path / "out"))
    original, opened = (AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (chat, result))
    assert opened.eos_token_id == [0, 5, 7]
    assert opened.temperature == 0.6
    assert opened.to_dict() == original.to_dict()


def test_no_generation_settings_are_made_up(model: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(model, tmp_path / "model")
    (plain / "generation_config.json").unlink()
    assert not (run(build_recipe(plain, tmp_path / "out")) / "generation_config.json").exists()


def test_folders_and_links_out_of_the_model_are_left_and_other_files_are_not_carried(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "out"
    for folder in (source / "LICENSES", target):
        folder.mkdir(parents=True)
    (tmp_path / "private").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "private")
    (source / "NOTICE").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("secret")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    for name in ("license.py", "license.safetensors", "notes.txt", "config.json", "MIT-LICENSE.txt"):
        (source / name).write_text("something")
    (source / "COPYING").symlink_to("MIT-LICENSE.txt")
    carry(Location(source), pico_tokenizer(), target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "MIT-LICENSE.txt": "something",
        "COPYING": "something",
    }


def test_files_of_a_snapshot_in_the_cache_of_the_hub_are_carried(tmp_path: Path) -> None:
    snapshot, target = tmp_path / "models--org--name/snapshots/0123", tmp_path / "out"
    for folder in (snapshot, tmp_path / "models--org--name/blobs", target):
        folder.mkdir(parents=True)
    (tmp_path / "models--org--name/blobs/4567").write_text("{}")
    (snapshot / "generation_config.json").symlink_to("../../blobs/4567")
    carry(Location(snapshot), pico_tokenizer(), target)
    assert [path.name for path in target.iterdir()] == ["generation_config.json"]
    assert not (target / "generation_config.json").is_symlink()
