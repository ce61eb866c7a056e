"""Text sources are read, mixed and cut into batches of tokens."""

import json
import re
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import Mock

import datasets
import huggingface_hub
import pyarrow
import pytest
import torch
from datasets import config
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from dashq.calibration.tokens import apportion, calibration_tokens, draw, evaluation_windows, read_documents
from dashq.errors import TextError
from dashq.recipe.recipe import Calibration, TextSource
from pico import pico_tokenizer

TOKENIZER = pico_tokenizer()
TOPICS = [topics[name] for name in sorted(topics)]
PYDOC = TextSource(name="pydoc")
CHAT = [{"role": "user", "content": "Why?"}, {"role": "pico", "content": "Because."}]


def source_of(folder: Path, *documents: object, **fields: Any) -> TextSource:
    """The documents as a .jsonl file."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    return TextSource(name=str(path), **fields)


def text_of(*sources: TextSource, samples: int, length: int, seed: int = 0, packing: bool = True) -> Calibration:
    """So many samples of a length from these sources, as a recipe asks for them."""
    return Calibration(dataset=sources, samples=samples, sequence_length=length, seed=seed, packing=packing)


def test_bare_string_is_a_name() -> None:
    assert TextSource.model_validate("c4") == TextSource(name="c4", split="train", field="text", weight=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"splitt": "test"}, "unknown key 'splitt'. Did you mean 'split'"), ({"weight": float("inf")}, "finite")],
)
def test_misspelt_or_meaningless_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextSource.model_validate({"name": "c4", **fields})


def test_pydoc_holds_out_every_fifth_topic() -> None:
    assert read_documents(TextSource(name="pydoc", split="test")) == TOPICS[4::5]
    assert read_documents(PYDOC) == [text for index, text in enumerate(TOPICS) if index % 5 != 4]


@pytest.mark.parametrize(
    ("file", "content", "documents"),
    [
        ("a.TXT", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a.jsonl", '{"text": "one", "id": 1}\n\n"two"\n', ["one", "two"]),
        ("a.jsonl", '"one\u2028still one"', ["one\u2028still one"]),
        ("a.json", '["one", {"text": "two"}]', ["one", "two"]),
        ("a.json", '{"version": 1, "data": [{"text": "one"}]}', ["one"]),
        ("a.json", json.dumps([{"text": CHAT}]), [CHAT]),
    ],
)
def test_local_files(tmp_path: Path, file: str, content: str, documents: list[Any]) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert read_documents(TextSource(name=str(tmp_path / file))) == documents


def test_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "two"], "chat": [CHAT, CHAT]}), path)
    assert read_documents(TextSource(name=str(path), field="body")) == ["one", "two"]
    assert read_documents(TextSource(name=str(path), field="chat")) == [CHAT, CHAT]
    with pytest.raises(TextError, match=r"a\.parquet has no field 'bodi'. Did you mean 'body'\? It has: body, chat"):
        read_documents(TextSource(name=str(path), field="bodi"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff", "cannot read .*utf-8"),
        ("a.jsonl", b'"one"\n\n{"text": two}\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}', r"a\.jsonl, record 2 has no field 'text'.*It has: txt"),
        ("a.json", b'[\n"one",\n}', r"a\.json, line 3: not JSON"),
        ("a.json", b'{"a": [], "b": []}', "one list; it has 2"),
        ("a.parquet", b"one", "cannot read .*a.parquet"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_documents(TextSource(name=str(tmp_path / file)))


def test_absent_file_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=re.escape(str(tmp_path / "absent.txt"))):
        read_documents(TextSource(name="absent.txt"))


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
    assert read_documents(TextSource(name="wikitext2", split="test")) == ["one\n\n\n\ntwo"]
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
    with pytest.raises(TextError, match=f"'org/name' .*cannot be reached: {obstacle}.* local .*'pydoc'"):
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


def test_equal_remainders_go_to_the_earlier_source() -> None:
    assert apportion(128, [0.7, 0.2, 0.1]) == [90, 25, 13]


@given(st.integers(1, 10**6), st.lists(st.floats(0, exclude_min=True, allow_infinity=False), min_size=1))
def test_shares_add_up_and_are_rounded_quotas(samples: int, weights: list[float]) -> None:
    shares, exact = apportion(samples, weights), [Fraction(str(weight)) for weight in weights]
    assert sum(shares) == samples
    assert all(abs(share - samples * weight / sum(exact)) < 1 for share, weight in zip(shares, exact, strict=True))


@settings(deadline=None)
@given(samples=st.integers(1, 12), tokens=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_windows_are_disjoint_pieces_of_the_text(
    tmp_path_factory: pytest.TempPathFactory, samples: int, tokens: int, seed: int
) -> None:
    source = source_of(tmp_path_factory.mktemp("text"), topics["assert"])
    ids = TOKENIZER.encode(topics["assert"])
    drawn = calibration_tokens(text_of(source, samples=samples, length=tokens, seed=seed), TOKENIZER)
    assert (drawn.shape, drawn.dtype) == ((samples, tokens), torch.int64)
    pieces = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    for row in drawn.tolist():
        pieces.remove(row)  # fails where it is no piece, or drawn twice


@pytest.mark.parametrize("packing", [True, False])
def test_pieces_are_held_out_beside_the_same_samples(packing: bool) -> None:
    text = text_of(PYDOC, samples=6, length=256, packing=packing)
    drawn = draw(text, TOKENIZER)
    assert drawn.samples.equal(calibration_tokens(text, TOKENIZER))
    assert drawn.held_out.shape == (4, 256)
    assert len(torch.cat([drawn.samples, drawn.held_out]).unique(dim=0)) == 10


def test_a_text_that_is_short_has_few_pieces_to_hold_out(tmp_path: Path) -> None:
    source = source_of(tmp_path, "x" * 20)
    assert [len(draw(text_of(source, samples=count, length=5), TOKENIZER).held_out) for count in (4, 3, 2)] == [0, 1, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_seed_decides_everything(packing: bool) -> None:
    sources = [PYDOC, TextSource(name="pydoc", split="test", weight=0.5)]
    texts = [text_of(*sources, samples=6, length=32, seed=seed, packing=packing) for seed in (1, 1, 2)]
    one, same, other = (calibration_tokens(text, TOKENIZER) for text in texts)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("eos", "texts", "ends"), [("</s>", "xxx", 2), ("</s>", "x", 0), (None, "xxx", 0)])
def test_end_token_separates_packed_documents(tmp_path: Path, eos: str | None, texts: str, ends: int) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = eos
    text = text_of(source_of(tmp_path, *texts, ""), samples=1, length=len(texts) + ends)
    batch = calibration_tokens(text, tokenizer)
    assert batch.tolist() == [TOKENIZER.encode("</s>".join(texts) if ends else texts)]


def test_without_packing_samples_begin_distinct_long_documents(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a" * 9, "b" * 3, "c" * 12, "d" * 8)
    drawn = calibration_tokens(text_of(source, samples=3, length=4, packing=False), TOKENIZER)
    assert sorted(TOKENIZER.batch_decode(drawn)) == ["aaaa", "cccc", "dddd"]


def test_sources_are_mixed_by_weight_and_shuffled(tmp_path: Path) -> None:
    sources = [source_of(tmp_path, "a" * 500, weight=3), source_of(tmp_path, "z" * 500)]
    letters = TOKENIZER.batch_decode(calibration_tokens(text_of(*sources, samples=40, length=1), TOKENIZER))
    assert (letters.count("a"), letters.count("z")) == (30, 10)
    assert letters != sorted(letters)


def test_only_a_part_of_a_huge_source_becomes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Mock(wraps=TOKENIZER.encode)
    monkeypatch.setattr(TOKENIZER, "encode", encode)
    calibration_tokens(text_of(PYDOC, samples=1, length=8), TOKENIZER)
    assert encode.call_count < 10 < len(read_documents(PYDOC))


@pytest.mark.parametrize(
    ("packing", "has", "samples", "tokens"),
    [(True, "11 tokens, 2 windows of 4", 2, 3), (False, "3 documents, 1 of them with 4 tokens", 1, 2)],
)
def test_too_short_says_what_fits(tmp_path: Path, packing: bool, has: str, samples: int, tokens: int) -> None:
    source = source_of(tmp_path, "x" * 4, "y" * 3, "z" * 2)
    ways = f"lower samples to {samples}, or lower sequence_length to {tokens}, or add text"
    with pytest.raises(TextError, match=f"has {has}, but its share is 3 samples: {ways}"):
        calibration_tokens(text_of(source, samples=3, length=4, packing=packing), TOKENIZER)
    fewer = text_of(source, samples=samples, length=4, packing=packing)
    shorter = text_of(source, samples=3, length=tokens, packing=packing)
    assert len(calibration_tokens(fewer, TOKENIZER)) == samples
    assert len(calibration_tokens(shorter, TOKENIZER)) == 3


def test_no_warning_of_long_texts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "model_max_length", 8)
    calibration_tokens(text_of(PYDOC, samples=6, length=32), TOKENIZER)
    assert not caplog.records


@pytest.mark.parametrize(("document", "text"), [("Hi", "<user>Hi</s>"), (CHAT, "<user>Why?</s><pico>Because.</s>")])
def test_chat_goes_through_the_template(tmp_path: Path, document: object, text: str) -> None:
    ids = TOKENIZER.encode(text)
    source = source_of(tmp_path, document, chat=True)
    batch = calibration_tokens(text_of(source, samples=1, length=len(ids)), TOKENIZER)
    assert batch.tolist() == [ids]


@pytest.mark.parametrize(
    ("document", "template", "chat", "message"),
    [
        (CHAT, "", False, "chat messages need chat: true"),
        ([{"from": "human", "value": "Why?"}], "", True, "no messages with role and content"),
        (7, "", True, "no messages with role and content"),
        (CHAT, None, True, "chat template, which failed: .*chat_template is not set"),
        (CHAT, "{{ raise_exception('No assistant!') }}", True, "chat template, which failed: No assistant!"),
    ],
)
def test_no_chat_is_refused(tmp_path: Path, document: object, template: str | None, chat: bool, message: str) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TextError, match=message):
        evaluation_windows(source_of(tmp_path, document, chat=chat), tokenizer, 32, limit=None)


@settings(deadline=None)
@given(context=st.integers(1, 400), limit=st.none() | st.integers(1, 9))
def test_evaluation_reads_the_whole_text_in_order(
    tmp_path_factory: pytest.TempPathFactory, context: int, limit: int | None
) -> None:
    source = source_of(tmp_path_factory.mktemp("text"), topics["assert"], topics["pass"])
    ids = TOKENIZER.encode(topics["assert"] + "\n\n" + topics["pass"])
    windows = evaluation_windows(source, TOKENIZER, context, limit)
    assert windows.shape == (min(len(ids) // context, limit or len(ids)), context)
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_evaluation_needs_one_window(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="has only 14 tokens: lower context from 15, or add text"):
        evaluation_windows(source_of(tmp_path, "x" * 14), TOKENIZER, 15, limit=None)
