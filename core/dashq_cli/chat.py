"""`dashq chat`."""

import sys
from typing import Annotated

import typer

from dashq_cli.formats import Trust
from dashq_cli.imports import starting

ENDS = ("exit", "quit")


def chat(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A result of dashq, or any other model.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this alone, then end.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens in each answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Above 0, tokens are drawn; 0 takes the likeliest. If not given, as the model says."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed that tokens are drawn with.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="What multiplies with packed layers: auto, exact or a kernel by name.")
    ] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a quantized model, of any format that opens here.

    Each line is a message; from a pipe too. `exit` or Ctrl-D ends, Ctrl-C
    stops an answer. A model without a chat template goes on with each text.
    """
    with starting():
        import torch

        from dashq.errors import TextError
        from dashq.measuring.evaluate import load_model
        from dashq_cli.conversation import Conversation, Drawing

    if sys.stdin.isatty() and prompt is None:
        typer.echo("reading the model …", err=True)
    loaded = load_model(model, device, dtype, trust_remote_code, kernels=kernels)
    torch.manual_seed(seed)
    conversation = Conversation(loaded, Drawing(tokens, temperature), system)
    if not conversation.has_template:
        typer.echo("note: this model has no chat template: it goes on with each text", err=True)
    if prompt is not None:
        conversation.answer(prompt)
        return
    if sys.stdin.isatty():
        typer.echo("exit or Ctrl-D ends, Ctrl-C stops an answer", err=True)
    while (message := _next_message()) is not None:
        try:
            conversation.answer(message)
        except TextError as error:  # of this message alone
            typer.echo(f"dashq: {error}", err=True)


def _next_message() -> str | None:
    """The next line that holds something; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                typer.echo(err=True)
            return None
        if line in ENDS:
            return None
        if line:
            return line
