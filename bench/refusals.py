"""Plans of layers that a format refuses, in seconds, beside those of as many that it accepts."""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench._record import result_line
from dashq import Layer, PlanError, Recipe, load_recipe, load_registry, make_plan

RECIPE = Path("recipes/smollm2_2bit.yaml")
ACCEPTED = {"scheme.bits": "4", "serializer": "mlx"}
# By reason, the columns by which layers differ, None for experts of one shape, and what is refused of them.
REFUSED = {
    "bits": (None, {"scheme.bits": "7"}),
    "groups": (None, {"scheme.grouper.size": "16"}),
    "experts": (None, {"serializer": "gptq"}),
    "no router": (None, {"scheme.router": "null"}),
    "groups, dense layers of one shape": (0, {"serializer": "gguf"}),
    "groups, dense layers of as many shapes": (64, {"serializer": "gguf"}),
}


def main() -> None:
    """Print one line of JSON for each number of layers and each reason to refuse them."""
    parser = argparse.ArgumentParser(prog="python -m bench refusals", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[200, 12288])
    parser.add_argument("--reasons", nargs="*", default=list(REFUSED), choices=list(REFUSED))
    parser.add_argument("--repeat", type=int, default=5, help="measurements, of which the shortest counts")
    arguments = parser.parse_args()
    for count in arguments.layers:
        for reason in arguments.reasons:
            step, settings = REFUSED[reason]
            layers = [_layer(number, step) for number in range(count)]
            accepted, refused = (
                _seconds(_recipe(entries), layers, arguments.repeat) for entries in (ACCEPTED, ACCEPTED | settings)
            )
            line = {"layers": count, "refused": reason, "accepted_seconds": accepted, "refused_seconds": refused}
            line |= {"ratio": round(refused / accepted, 2), "repeat": arguments.repeat}
            print(result_line(line), flush=True)


def _layer(number: int, step: int | None) -> Layer:
    if step is None:
        return Layer(name=f"model.layers.0.mlp.experts.down_proj.{number}", rows=64, columns=128, expert=number)
    return Layer(name=f"model.layers.{number}.mlp.down_proj", rows=64, columns=128 + number * step)


def _recipe(settings: dict[str, str]) -> Recipe:
    usual = {"scheme.router": "routed", "embeddings": "null"}
    return load_recipe(RECIPE, load_registry(), [f"{key}={value}" for key, value in (usual | settings).items()])


def _seconds(recipe: Recipe, layers: list[Layer], repeat: int) -> float:
    """The shortest of some plans of these layers, whether they are refused or not."""
    return round(min(_timed(lambda: _plan(recipe, layers)) for _ in range(repeat)), 4)


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plan(recipe: Recipe, layers: list[Layer]) -> None:
    with suppress(PlanError):
        make_plan(recipe, layers)


if __name__ == "__main__":
    main()
