"""Shares of the samples follow from the recipe alone, and every process has its own."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashq import make_plan
from dashq.calibration import shares as under_test
from dashq.calibration.shares import Shares
from dashq.errors import ProcessesError
from dashq.processes.group import Processes
from dashq.quantizing.opening import open_model
from recipes import build_recipe


def of(
    model: Path, tmp_path: Path, samples: int, length: int, estimator: object = "diagonal", shares: int = 8
) -> Shares:
    recipe = build_recipe(model, tmp_path / "out", scheme={**build_scheme(estimator)})
    plans = make_plan(recipe, open_model(recipe).layers())
    text = recipe.calibration.model_copy(update={"samples": samples, "sequence_length": length, "shares": shares})
    return Shares.of(plans, text)


def build_scheme(estimator: object) -> dict[str, object]:
    return {"bits": 3, "estimator": estimator, "grouper": {"name": "contiguous", "size": 16}, "solver": "irls"}


@pytest.mark.parametrize(
    ("samples", "length", "batch"),
    [(128, 2048, 2), (16, 512, 2), (16, 4096, 1), (8, 32, 1), (3, 40, 1), (1000, 32, 125), (2000, 32, 128)],
)
def test_batches_are_as_large_as_memory_likes_or_make_eight(
    samples: int, length: int, batch: int, model: Path, tmp_path: Path
) -> None:
    shares = of(model, tmp_path, samples, length)
    assert shares.samples_per_batch == batch
    assert shares.count == min(8, samples)


@pytest.mark.parametrize(("samples", "shares", "batch"), [(128, 64, 2), (128, 128, 1), (100, 64, 1), (128, 1, 2)])
def test_a_recipe_can_ask_for_more_shares(samples: int, shares: int, batch: int, model: Path, tmp_path: Path) -> None:
    made = of(model, tmp_path, samples, 2048, shares=shares)
    assert (made.samples_per_batch, made.count) == (batch, shares)


def test_batches_are_cut_at_multiples_of_an_estimators_chunks(model: Path, tmp_path: Path) -> None:
    hybrid = {"name": "hybrid", "chunk": 512}  # compares chunks of up to 2048 tokens
    assert of(model, tmp_path, 16, 512, hybrid) == Shares(16, 4, 8)
    assert of(model, tmp_path, 128, 2048, hybrid) == Shares(128, 2, 8)
    assert of(model, tmp_path, 16, 500, hybrid) == Shares(16, 8, 8)  # no batch has whole chunks


@given(samples=st.integers(1, 300), batch=st.integers(1, 40), data=st.data())
def test_every_sample_is_in_one_share_of_one_process(samples: int, batch: int, data: st.DataObject) -> None:
    shares = Shares(samples, batch, data.draw(st.integers(1, 20)))
    count = data.draw(st.integers(1, shares.count))
    seen: list[int] = []
    batches: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(count):
            patch.setattr(under_test, "here", lambda rank=rank: Processes(rank, count))
            own = range(samples)[shares.own_samples]
            assert own.start % batch == 0
            assert [batch for share in shares.own_batches for batch in share] == [*range(-(-len(own) // batch))]
            seen += own
            batches += map(len, shares.own_batches)
    assert seen == [*range(samples)]
    assert all(batches)
    assert batches == [*map(len, shares.own_batches)]  # of one process, which has them all


@pytest.mark.parametrize(("most", "key"), [(8, "samples"), (4, "shares")])
def test_more_processes_than_shares_are_refused(most: int, key: str) -> None:
    Shares(16, 4, most).check(4)
    with pytest.raises(ProcessesError) as error:
        Shares(16, 4, most).check(5)
    assert str(error.value) == (
        "5 processes are more than the 4 shares that the samples of the recipe make, in batches of 4: use at most 4, "
        f"or raise calibration.{key}, which changes the last digits of the result"
    )
