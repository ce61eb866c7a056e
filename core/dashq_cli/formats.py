"""`dashq convert`, `dashq formats` and `dashq verify`."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dashq_cli.imports import starting

if TYPE_CHECKING:
    from dashq import Grid, Serializer
    from dashq.results.verify import Check

Result = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a result.", show_default=False)]
Push = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this repository of the hub.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies beside the weights: only where you trust it.")
]
ROWS, COLUMNS = 32, 768
TRIED_SIZES = (16, 32, 64, 100, 128, 256)  # all but 100 divide the columns


def convert(
    folder: Result,
    to: Annotated[str, typer.Option(help="A format's name, or `{name: NAME, PARAMETER: VALUE}`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The new folder; beside OUT, with the format's name, if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output.")] = False,
    push_to_hub: Push = None,
    trust_remote_code: Trust = False,
) -> None:
    """Pack a result anew in another format where that loses nothing.

    Exits with 2 where it would, and names the layers to solve again.
    """
    with starting():
        from dashq.recipe.recipe import read_serializer
        from dashq.registry import load_registry
        from dashq.results.convert import convert as repack

    check_push(push_to_hub)
    registry = load_registry()
    serializer = read_serializer(to, registry)
    target = output or folder.resolve().with_name(f"{folder.resolve().name}-{serializer.name}")
    repack(folder, serializer, target, overwrite, registry, trust_remote_code)
    typer.echo(f"the result is in {target}: the same numbers, packed as {serializer.name}; nothing was solved again")
    push(target, push_to_hub)


def check_push(repository: str | None) -> None:
    """Refuse a repository that could not be pushed to, before hours of work; nothing where none is named."""
    if repository is not None:
        from dashq.results.hub import check_repository

        check_repository(repository)


def push(folder: Path, repository: str | None) -> None:
    """Upload a finished result if a repository is named."""
    if repository is not None:
        from dashq.results.hub import push as upload

        typer.echo(f"the result is at {upload(folder, repository)}")


@starting()
def formats() -> None:
    """Show the installed formats with their bits, group sizes and zeros.

    The last column has the programs that `dashq verify` compares with;
    `dashq plugins list` says more of each format.
    """
    from dashq.registry import load_registry

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("format", "bits", "groups", "zero"):
        table.add_column(heading, no_wrap=True)
    table.add_column("verify --with", overflow="fold")
    registry = load_registry()
    for name, cls in registry.serializers.items():
        grids = _grids(cls)
        sizes = [size for size in TRIED_SIZES if any(_holds(serializer, size, grid) for serializer, grid in grids)]
        table.add_row(
            name,
            runs(sorted({grid.bits for _, grid in grids})),
            _sizes(sizes),
            ", ".join(dict.fromkeys(grid.zero for _, grid in grids)),
            ", ".join(registry.programs.get(name, ())) or "–",
        )
    Console(markup=False, highlight=False).print(table)


def verify(
    folder: Result,
    program: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="PROGRAM",
            help="A program that opens the format: mlx, mlx-lm, transformers, gptqmodel, vllm, gguf, llama.cpp, "
            "llama.cpp-float32 or a plugin's; `dashq formats` has those of each format.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare a result with the solver's numbers and with other programs.

    Every layer is unpacked and its numbers compared bit by bit, every tensor,
    and every file that came along from the model, with what the run wrote,
    and what config.json and other files say with what the run wrote and the
    format wants there. With a program, its weights are compared as well, then
    its logits for a fixed prompt; mlx and gguf give weights alone. llama.cpp
    rounds what it multiplies with to 8 bits, which is allowed for;
    llama.cpp-float32 is the same program with the same weights in float32,
    which have to agree more closely. Exits with 1 where anything differs by
    more than is allowed.
    """
    with starting():
        from dashq.registry import load_registry
        from dashq.results.verify import verify as compare

    checks: list[Check] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=None)
        for check in compare(folder, program, load_registry(), trust_remote_code):
            checks.append(check)
            progress.advance(task)
    _print(checks)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _print(checks: "list[Check]") -> None:
    """Print how many comparisons passed, and all that failed."""
    table = Table("compared with", box=None, header_style="bold", pad_edge=False)
    for heading in ("what", "same", "largest difference", "allowed"):
        table.add_column(heading, overflow="fold")
    for against in dict.fromkeys(check.against for check in checks):
        for kind in ("layers", "tensors", "files", "settings", "logits"):
            if alike := [check for check in checks if (check.against, check.kind) == (against, kind)]:
                same = sum(check.passed for check in alike)
                worst = max(check.difference for check in alike)
                allowed = max(check.allowed for check in alike)
                table.add_row(against, kind, f"{same} of {len(alike)}", f"{worst:.3g}", f"{allowed:.3g}")
    console = Console()
    console.print(table)
    for check in checks:
        if not check.passed:
            console.print(
                f"[red]differs[/] {escape(check.name)} from {check.against} by {check.difference:.3g}", highlight=False
            )


def _settings(cls: "type[Serializer]") -> "Iterator[Serializer]":
    """The format with its defaults, and with each word that one of its parameters can be."""
    yield cls()
    for name, parameter in cls.model_fields.items():
        if get_origin(parameter.annotation) is Literal:
            yield from (cls(**{name: word}) for word in get_args(parameter.annotation) if word != parameter.default)


def runs(numbers: list[int]) -> str:
    """Rising numbers in short: 2, 3, 4, 8 as `2–4, 8`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _sizes(sizes: list[int]) -> str:
    """The group sizes among those that were tried, or a word for all of them or all divisors of the columns."""
    if len(sizes) == len(TRIED_SIZES):
        return "any"
    divisors = [size for size in TRIED_SIZES if not COLUMNS % size]
    return "any divisor" if sizes == divisors else ", ".join(map(str, sizes))


def _grids(cls: "type[Serializer]") -> "list[tuple[Serializer, Grid]]":
    """The grids that a format holds, each with the parameters that it is for."""
    from dashq.errors import PlanError

    grids = []
    for serializer in _settings(cls):
        for bits in range(1, 9):
            with suppress(PlanError):
                grids.append((serializer, serializer.grid(bits)))
    return grids


def _holds(serializer: "Serializer", size: int, grid: "Grid") -> bool:
    import torch

    from dashq.data import Layer, StoredLayer
    from dashq.errors import PlanError

    layer = Layer(name="any layer", rows=ROWS, columns=COLUMNS)
    empty = StoredLayer(layer=layer, grid=grid, size=size, ordered=False).empty()
    # With values: to compute without them, as plans do, torch imports its compiler, which takes a second.
    tensors = (empty.codes, empty.scale, empty.offset)
    codes, scale, offset = (torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors)
    try:
        serializer.pack(replace(empty, codes=codes, scale=scale + 1, offset=offset))
    except PlanError:
        return False
    return True
