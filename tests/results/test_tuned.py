"""A tuning is told by its start and its best check."""

from dashq.results.tuned import Tuned, TuningCheck


def tuning(*divergences: float, note: str = "") -> Tuned:
    checks = tuple(
        TuningCheck(step=6 * n, divergence=divergence, loss=None) for n, divergence in enumerate(divergences)
    )
    changed = {"scale": 1200, "offset": 1200, "norm": 64}
    return Tuned(tuner="some_tuner", samples=15_360, held_out=2048, checks=checks, changed=changed, note=note)


def test_a_tuning_is_told_by_its_start_and_its_best_check() -> None:
    told = tuning(0.9, 0.5, 0.6)
    assert (told.before, told.best.step) == (0.9, 6)
    start = "divergence from the original 0.900 → "
    assert str(told) == (
        f"{start}0.500 nats per token on text that the tuner did not learn from, after 6 steps of some_tuner on 15,360 "
        "tokens, which change 1,200 scales, 1,200 offsets, 64 gains of norms"
    )
    assert str(tuning(0.9, 0.5, note="it stopped")).endswith("64 gains of norms; it stopped")
    unchanged = str(tuning(0.9, 0.95))
    assert unchanged.startswith(f"{start}0.900 nats")
    assert unchanged.endswith(
        "after 0 steps of some_tuner on 15,360 tokens: nothing is changed, since no later step was better"
    )
