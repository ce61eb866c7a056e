"""Text sources are read, mixed and cut into batches of tokens."""

import re
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dashq.calibration import documents, text_files, tokens
from dashq.calibration.sources import read_documents
from dashq.calibration.tokens import RUN, Avoided, Drawn, apportion, draw, draw_for, draw_to_tune, evaluation_windows
from dashq.errors import TextError
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.recipe.recipe import Calibration, Recipe
from dashq.text_source import TextSource
from pico import beginning_tokenizer, pico_model, pico_tokenizer
from recipes import build_recipe
from texts import source_of

TOKENIZER = pico_tokenizer()
PYDOC = TextSource(name="pydoc")


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
    drawn = draw(text_of(source, samples=samples, length=tokens, seed=seed), TOKENIZER).samples
    assert (drawn.shape, drawn.dtype) == ((samples, tokens), torch.int64)
    pieces = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
    for row in drawn.tolist():
        pieces.remove(row)  # fails where it is no piece, or drawn twice


@pytest.mark.parametrize("packing", [True, False])
def test_pieces_are_held_out_beside_the_samples(packing: bool) -> None:
    text = text_of(PYDOC, samples=6, length=256, packing=packing)
    drawn = draw(text, TOKENIZER)
    assert (drawn.samples.shape, drawn.held_out.shape) == ((6, 256), (4, 256))
    assert len(torch.cat([drawn.samples, drawn.held_out]).unique(dim=0)) == 10


def test_a_text_that_is_short_has_few_pieces_to_hold_out(tmp_path: Path) -> None:
    source = source_of(tmp_path, "x" * 20)
    assert [len(draw(text_of(source, samples=count, length=5), TOKENIZER).held_out) for count in (4, 3, 2)] == [0, 1, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_seed_decides_everything(packing: bool) -> None:
    sources = [PYDOC, TextSource(name="pydoc", split="test", weight=0.5)]
    texts = [text_of(*sources, samples=6, length=32, seed=seed, packing=packing) for seed in (1, 1, 2)]
    one, same, other = (draw(text, TOKENIZER).samples for text in texts)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("eos", "texts", "ends"), [("</s>", "xxx", 2), ("</s>", "x", 0), (None, "xxx", 0)])
def test_end_token_separates_packed_documents(tmp_path: Path, eos: str | None, texts: str, ends: int) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = eos
    text = text_of(source_of(tmp_path, *texts, ""), samples=1, length=len(texts) + ends)
    batch = draw(text, tokenizer).samples
    assert batch.tolist() == [TOKENIZER.encode("</s>".join(texts) if ends else texts)]


def test_without_packing_samples_begin_distinct_long_documents(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a" * 9, "b" * 3, "c" * 12, "d" * 8)
    drawn = draw(text_of(source, samples=3, length=4, packing=False), TOKENIZER).samples
    assert sorted(TOKENIZER.batch_decode(drawn)) == ["aaaa", "cccc", "dddd"]


def test_sources_are_mixed_by_weight_and_shuffled(tmp_path: Path) -> None:
    sources = [source_of(tmp_path, "a" * 500, weight=3), source_of(tmp_path, "z" * 500)]
    letters = TOKENIZER.batch_decode(draw(text_of(*sources, samples=40, length=1), TOKENIZER).samples)
    assert (letters.count("a"), letters.count("z")) == (30, 10)
    assert letters != sorted(letters)


def test_only_a_part_of_a_huge_source_becomes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Mock(wraps=TOKENIZER.encode)
    monkeypatch.setattr(TOKENIZER, "encode", encode)
    draw(text_of(PYDOC, samples=1, length=8), TOKENIZER)
    assert encode.call_count < 10 < len(read_documents(PYDOC))


@pytest.mark.parametrize(
    ("packing", "has", "samples", "tokens"),
    [(True, "11 tokens, 2 windows of 4", 2, 3), (False, "3 documents, 1 of them with 4 tokens", 1, 2)],
)
def test_too_short_says_what_fits(tmp_path: Path, packing: bool, has: str, samples: int, tokens: int) -> None:
    source = source_of(tmp_path, "x" * 4, "y" * 3, "z" * 2)
    ways = f"lower samples to {samples}, or lower sequence_length to {tokens}, or add text"
    with pytest.raises(TextError, match=f"has {has}, but its share is 3 samples: {ways}"):
        draw(text_of(source, samples=3, length=4, packing=packing), TOKENIZER)
    fewer = text_of(source, samples=samples, length=4, packing=packing)
    shorter = text_of(source, samples=3, length=tokens, packing=packing)
    assert len(draw(fewer, TOKENIZER).samples) == samples
    assert len(draw(shorter, TOKENIZER).samples) == 3


def test_no_warning_of_long_texts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "model_max_length", 8)
    draw(text_of(PYDOC, samples=6, length=32), TOKENIZER)
    assert not caplog.records


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


def test_nothing_is_drawn_differently_where_texts_begin_with_no_token() -> None:
    texts = [Calibration(dataset=(PYDOC,), samples=5, sequence_length=32, beginning=value) for value in ("auto", False)]
    auto, never = (draw(text, TOKENIZER).samples for text in texts)
    assert auto.equal(never)


@pytest.mark.parametrize("beginning", [("<s>",), ("<mask>", "<s>")])
@pytest.mark.parametrize("packing", [True, False])
def test_samples_begin_with_the_tokens_that_begin_texts(packing: bool, beginning: tuple[str, ...]) -> None:
    tokenizer, size = beginning_tokenizer(*beginning), len(beginning)
    text = text_of(PYDOC, samples=6, length=32, packing=packing)
    drawn = draw(text, tokenizer).samples
    assert drawn.shape == (6, 32)
    assert drawn[:, :size].tolist() == [tokenizer.convert_tokens_to_ids([*beginning])] * 6
    without = text.model_copy(update={"beginning": False, "sequence_length": 32 - size})
    assert drawn[:, size:].equal(draw(without, tokenizer).samples)


def test_samples_can_be_asked_to_begin_with_a_token() -> None:
    tokenizer = beginning_tokenizer()  # it has one, and begins no text with it
    text = text_of(PYDOC, samples=2, length=9)
    assert tokenizer.bos_token_id not in draw(text, tokenizer).samples
    drawn = draw(text.model_copy(update={"beginning": True}), tokenizer).samples
    assert drawn[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    with pytest.raises(TextError, match=r"`beginning: true`, but the tokenizer has no token .*use auto"):
        draw(text.model_copy(update={"beginning": True}), TOKENIZER)


@pytest.mark.parametrize("packing", [True, False])
def test_a_token_that_the_chat_template_writes_is_not_doubled(tmp_path: Path, packing: bool) -> None:
    tokenizer = beginning_tokenizer("<s>")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    source = source_of(tmp_path, "12345678", chat=True)
    drawn = draw(text_of(source, samples=1, length=4, packing=packing), tokenizer).samples
    assert drawn[0].tolist().count(tokenizer.bos_token_id) == 1
    windows = evaluation_windows(source, tokenizer, 4, None)
    assert tokenizer.batch_decode(windows) == ["<s>123", "<s>456"]


def test_every_window_begins_with_the_token(tmp_path: Path) -> None:
    source = source_of(tmp_path, "12345678")
    windows = evaluation_windows(source, beginning_tokenizer("<s>"), 4, None)
    assert beginning_tokenizer("<s>").batch_decode(windows) == ["<s>123", "<s>456"]
    assert TOKENIZER.batch_decode(evaluation_windows(source, beginning_tokenizer("<s>"), 4, None, False)) == [
        "1234",
        "5678",
    ]


def test_a_sample_needs_room_for_text() -> None:
    with pytest.raises(TextError, match="no text fits into 1 tokens, the first 1 of which begin every text"):
        draw(text_of(PYDOC, samples=1, length=1), beginning_tokenizer("<s>"))


def test_too_short_counts_the_beginning(tmp_path: Path) -> None:
    source, tokenizer = source_of(tmp_path, "x" * 11), beginning_tokenizer("<s>")
    with pytest.raises(TextError, match="lower samples to 2, or lower sequence_length to 4"):
        draw(text_of(source, samples=3, length=5), tokenizer)
    assert draw(text_of(source, samples=3, length=4), tokenizer).samples.shape == (3, 4)


@pytest.mark.parametrize("packing", [True, False])
def test_of_a_long_text_only_what_is_drawn_is_tokenized(
    tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("assert the line\n" * 60)
    for module in (documents, text_files, tokens):
        monkeypatch.setattr(module, "WHOLE", 500, raising=False)
        monkeypatch.setattr(module, "PIECE", 64, raising=False)
    monkeypatch.setattr(tokens, "HELD_OUT_TOKENS", 5)
    encode = Mock(wraps=TOKENIZER.encode)
    monkeypatch.setattr(TOKENIZER, "encode", encode)
    for source in (TextSource(name=str(path)), source_of(tmp_path, path.read_text())):  # a file, and a document
        encode.reset_mock()
        text = text_of(source, samples=2, length=5, packing=packing)
        drawn = draw(text, TOKENIZER).samples
        assert all(len(call.args[0]) <= 128 for call in encode.call_args_list)
        assert encode.call_count < 6
        assert drawn.equal(draw(text, TOKENIZER).samples)


def test_a_long_text_is_evaluated_in_pieces_and_no_further_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = "assert the line\n" * 60
    (tmp_path / "a.txt").write_text(whole)
    sources = [TextSource(name=str(tmp_path / "a.txt")), source_of(tmp_path, *[whole[:480]] * 2)]
    expected = [whole, f"{whole[:480]}\n\n{whole[:480]}"]
    for module in (documents, text_files, tokens):
        monkeypatch.setattr(module, "WHOLE", 500, raising=False)
        monkeypatch.setattr(module, "PIECE", 64, raising=False)
    encode = Mock(wraps=TOKENIZER.encode)
    monkeypatch.setattr(TOKENIZER, "encode", encode)
    for source, text in zip(sources, expected, strict=True):
        windows = evaluation_windows(source, TOKENIZER, 7, None)
        assert text.startswith("".join(TOKENIZER.batch_decode(windows)))
        assert windows.numel() > 250
        encode.reset_mock()
        assert evaluation_windows(source, TOKENIZER, 7, 2).equal(windows[:2])
        assert encode.call_count == 3  # two of them try how texts begin


def test_a_document_that_is_no_text_is_named(tmp_path: Path) -> None:
    text = text_of(source_of(tmp_path, "one", None, "two"), samples=1, length=8)
    with pytest.raises(TextError, match=r"0\.jsonl, line 2 holds no text in 'text' but null"):
        draw(text, TOKENIZER)
    (tmp_path / "half.jsonl").write_text('"one"\n"tw\\ud800"')
    with pytest.raises(TextError, match=r"half\.jsonl, line 2 holds half of a surrogate pair, at letter 3"):
        draw(text_of(TextSource(name=str(tmp_path / "half.jsonl")), samples=1, length=8), TOKENIZER)


def runs(drawn: Drawn, length: int, begun: int = 0) -> set[tuple[int, ...]]:
    """All runs of so many tokens in the pieces, behind the tokens that they begin with."""
    rows = [row[begun:] for row in (*drawn.samples.tolist(), *drawn.held_out.tolist())]
    return {tuple(row[start : start + length]) for row in rows for start in range(len(row) - length + 1)}


@settings(max_examples=6)
@given(
    lengths=st.tuples(st.integers(8, 100), st.integers(8, 100)),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    packing=st.booleans(),
    begins=st.booleans(),
)
def test_pieces_share_no_long_run_with_those_that_they_avoid(
    lengths: tuple[int, int], seeds: tuple[int, int], packing: bool, begins: bool
) -> None:
    tokenizer = beginning_tokenizer("<s>") if begins else TOKENIZER
    first, second = (
        text_of(PYDOC, samples=6, length=length, seed=seed, packing=packing)
        for length, seed in zip(lengths, seeds, strict=True)
    )
    theirs = draw(first, tokenizer, held_out_tokens=200)
    ours = draw(second, tokenizer, 200, Avoided(theirs, second.sequence_length))
    run = min(2 * RUN, *(length - begins for length in lengths)) if lengths[0] >= lengths[1] else 2 * RUN
    assert not runs(theirs, run, begins) & runs(ours, run, begins)
    assert len(ours.held_out)


def test_pieces_are_the_same_whether_what_is_far_away_is_avoided_or_not(tmp_path: Path) -> None:
    far = draw(text_of(source_of(tmp_path, "1234567890 " * 40), samples=2, length=40), TOKENIZER)
    text = text_of(PYDOC, samples=4, length=40, packing=False)
    assert draw(text, TOKENIZER, 80, Avoided(far, 40)).samples.equal(draw(text, TOKENIZER, 80).samples)


def opened(folder: Path, text: Path, **tuner: Any) -> tuple[Model, Recipe]:
    """A model, and its recipe with a tuner, on the text of a file."""
    calibration = {"dataset": str(text), "samples": 4, "sequence_length": 40}
    tuner = {"name": "distill", "samples": 4, "sequence_length": 40} | tuner
    recipe = build_recipe(pico_model("llama", folder / "model"), folder / "out", calibration=calibration, tuner=tuner)
    return open_model(recipe), recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A text of some 1000 tokens, all different."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(700))))
    return path


def drawn_to_tune(model: Model, recipe: Recipe) -> tuple[Drawn, Drawn]:
    assert recipe.tuner
    theirs = draw_for(model, recipe.calibration)
    return theirs, draw_to_tune(model, recipe, recipe.tuner, theirs)


def test_a_tuners_text_is_the_calibrations_but_none_of_its_pieces(tmp_path: Path, file: Path) -> None:
    theirs, ours = drawn_to_tune(*opened(tmp_path, file))
    assert ours.samples.shape == (4, 40)
    assert not runs(theirs, 40) & runs(ours, 40)
    again = drawn_to_tune(*opened(tmp_path, file))[1]
    other = drawn_to_tune(*opened(tmp_path, file, seed=5))[1]
    assert again.samples.equal(ours.samples)
    assert not other.samples.equal(ours.samples)


def test_a_tuners_own_text_is_drawn_as_the_calibrations(tmp_path: Path, file: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("so it goes, " * 400)
    _, ours = drawn_to_tune(*opened(tmp_path, file, dataset=str(own)))
    assert set(ours.samples.flatten().tolist()) <= set(TOKENIZER.encode("so it goes, so it goes, "))


def test_a_text_without_enough_pieces_beside_the_calibrations_is_refused_in_words(tmp_path: Path, file: Path) -> None:
    model, recipe = opened(tmp_path, file, samples=1000)
    with pytest.raises(TextError, match=r"that calibration does not see, of \d+, but its share is 1000 samples: lower"):
        drawn_to_tune(model, recipe)


def test_a_text_without_a_piece_to_check_on_is_refused_in_words(tmp_path: Path, file: Path) -> None:
    model, recipe = opened(tmp_path, file, samples=1000)
    with pytest.raises(TextError) as error:
        drawn_to_tune(model, recipe)
    (samples,) = re.findall(r"lower samples to (\d+)", str(error.value))
    model, recipe = opened(tmp_path, file, samples=int(samples))
    with pytest.raises(TextError, match="the tuner's text has no piece of 40 tokens left to check on"):
        drawn_to_tune(model, recipe)
    drawn_to_tune(*opened(tmp_path, file, samples=int(samples) - 1))


def test_a_tuner_beyond_the_models_positions_is_refused_by_its_key(tmp_path: Path, file: Path) -> None:
    model, recipe = opened(tmp_path, file, sequence_length=300)
    with pytest.raises(TextError, match=r"tuner\.sequence_length"):
        drawn_to_tune(model, recipe)
