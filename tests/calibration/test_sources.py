"""Text sources are found on this machine, on the hub or in its cache, or named where they are not."""

from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
from datasets import config
from datasets.exceptions import DatasetNotFoundError

from dashq.calibration.sources import read_documents
from dashq.errors import TextError
from dashq.text_source import TextSource
from texts import source_of

TOPICS = [topics[name] for name in sorted(topics)]
PYDOC = TextSource(name="pydoc")


def test_pydoc_holds_out_every_fifth_topic() -> None:
    assert list(read_documents(TextSource(name="pydoc", split="test"))) == TOPICS[4::5]
    assert list(read_documents(PYDOC)) == [text for index, text in enumerate(TOPICS) if index % 5 != 4]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A hub that holds the same three rows under every name."""
    load_dataset = Mock(return_value=datasets.Dataset.from_dict({"text": ["one", "", "two"], "id": [1, 2, 3]}))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "get_session", Mock())
    return load_dataset


def test_hub_dataset(hub: Mock) -> None:
    assert list(read_documents(TextSource(name="org/name", subset="small", split="test[:3]"))) == ["one", "", "two"]
    hub.assert_called_once_with("org/name", "small", split="test[:3]")


def test_wikitext_is_one_document(hub: Mock) -> None:
    assert list(read_documents(TextSource(name="wikitext2", split="test"))) == ["one\n\n\n\ntwo"]
    hub.assert_called_once_with("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")


def test_c4_is_its_first_file(hub: Mock) -> None:
    assert list(read_documents(TextSource(name="c4", split="validation"))) == ["one", "", "two"]
    options = {
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "verification_mode": "no_checks",
    }
    hub.assert_called_once_with("allenai/c4", None, split="validation", **options)


def test_absent_dataset_is_named(hub: Mock) -> None:
    hub.side_effect = DatasetNotFoundError("it does not exist on the hub")
    with pytest.raises(TextError, match="'org/absent' cannot be loaded: it does not exist on the hub"):
        read_documents(TextSource(name="org/absent"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "org/name", "field": "body"}, "'org/name' has no field 'body'.*It has: text, id"),
        ({"name": "pydoc", "split": "validation"}, "'pydoc' has no split 'validation'.*It has: train, test"),
        ({"name": "c4", "split": "test"}, "'c4' has no split 'test'.*It has: train, validation"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_a_dataset_lacks_is_named(fields: dict[str, str], message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_documents(TextSource.model_validate(fields))


@pytest.mark.parametrize(("offline", "obstacle"), [(True, "HF_HUB_OFFLINE"), (False, "http://127.0.0.1:9")])
def test_no_connection_is_told(monkeypatch: pytest.MonkeyPatch, offline: bool, obstacle: str) -> None:
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TextError, match=f"'org/name' .*cannot be reached: {obstacle}.* local file .*'pydoc'"):
        read_documents(TextSource(name="org/name"))
    assert config.HF_HUB_OFFLINE is offline  # as it was


def test_without_connection_the_local_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    builder = datasets.load_dataset_builder("json", data_files={"train": source_of(tmp_path, "one", "two").name})
    builder.dataset_name = builder.info.dataset_name = "name"
    builder.info.config_name = "default"
    builder.download_and_prepare(str(tmp_path / "cache" / "org___name" / "default" / "0.0.0" / "fingerprint"))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    assert list(read_documents(TextSource(name="org/name"))) == ["one", "two"]
    with pytest.raises(TextError, match=r"'org/name' cannot be loaded: .*train"):
        read_documents(TextSource(name="org/name", split="dev"))


@pytest.mark.parametrize("name", ["notes", "secret/notes", "secret/notes.md", "secret/customers.jsonl.gz", "plan.docx"])
def test_a_local_file_is_never_asked_of_the_hub(
    name: str, hub: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("assert")
    with suppress(TextError):  # of an ending that is not known
        read_documents(TextSource(name=name))
    hub.assert_not_called()
    vars(huggingface_hub)["get_session"].assert_not_called()


@pytest.mark.parametrize(
    "name",
    ["absent.txt", "secret/absent.jsonl.gz", "/absent", "./absent", "a/b/c", "~/absent", "/dev/null", "x/" * 5000],
)
def test_what_looks_like_a_local_file_is_never_asked_of_the_hub(name: str, hub: Mock) -> None:
    with pytest.raises(TextError, match=r"there is no file|there can be no file|is no file but"):
        read_documents(TextSource(name=name))
    hub.assert_not_called()


def test_a_local_folder_is_a_dataset_without_a_network(hub: Mock, tmp_path: Path) -> None:
    assert list(read_documents(TextSource(name=str(tmp_path)))) == ["one", "", "two"]
    hub.assert_called_once_with(str(tmp_path), None, split="train")
    vars(huggingface_hub)["get_session"].assert_not_called()


def test_the_home_of_nobody_is_named() -> None:
    with pytest.raises(TextError, match="~nobody-there"):
        read_documents(TextSource(name="~nobody-there/a.txt"))


def test_a_document_of_a_dataset_is_named_by_its_row(hub: Mock) -> None:
    assert read_documents(TextSource(name="org/name")).place(2) == "the dataset 'org/name', row 3"
    assert read_documents(TextSource(name="wikitext2")).place(0) == "'wikitext2'"
