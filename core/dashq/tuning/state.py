"""The state of a tuner between two steps, in memory and on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dashq.errors import OutputError
from dashq.processes.group import here
from dashq.results.files import writing
from dashq.results.tuned import TuningCheck

_CHECKS = TypeAdapter(list[TuningCheck])
_STEP, _CHECKED, _NOTE, _NUMBERS = "step", "checks", "note", "numbers"  # entries of the file's metadata


@dataclass(eq=False)
class TunerState:
    """The parameters and their optimizer after `step` steps, and the best parameters by the `checks` so far.

    `note` says why the steps ended early, where they did.
    """

    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    checks: list[TuningCheck] = field(default_factory=list)
    best: Sequence[Tensor] = ()
    note: str = ""

    def save(self, path: Path) -> None:
        """Write the state, all or nothing."""
        tensors = {f"latest.{index}": parameter.detach() for index, parameter in enumerate(self.parameters)}
        tensors |= {f"best.{index}": tensor for index, tensor in enumerate(self.best)}
        numbers: dict[str, Any] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{index}.{key}"] = value
        checks = json.dumps([asdict(check) for check in self.checks])
        metadata = {_STEP: str(self.step), _CHECKED: checks, _NOTE: self.note, _NUMBERS: json.dumps(numbers)}
        with writing(path) as temporary:
            try:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
            except SafetensorError as error:
                raise OutputError(f"cannot write {path}: {error}") from error

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take over the state that an interrupted run of the same tuner has written; nothing where there is none."""
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            self.step, self.checks = int(metadata[_STEP]), _CHECKS.validate_json(metadata[_CHECKED])
            self.note = metadata[_NOTE]
            entries: dict[str, Any] = {**tensors, **json.loads(metadata[_NUMBERS])}
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"latest.{index}"])
            self.best = [tensors[f"best.{index}"] for index in range(len(self.parameters))]
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise OutputError(
                f"{path} is not as the interrupted run wrote it; --overwrite discards the run: {error}"
            ) from error
        state: dict[int, dict[str, Any]] = {}
        for name, value in entries.items():
            kind, number, *key = name.split(".", 2)
            if kind == "optimizer":
                state.setdefault(int(number), {})[key[0]] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def share(self) -> None:
        """Let every process have the first one's steps, checks, and parameters, the latest and the best."""
        known = [self.step, self.note, [asdict(check) for check in self.checks], len(self.best)]
        self.step, self.note, checks, best = here().of(0, known)
        self.checks = _CHECKS.validate_python(checks)
        if best and not self.best:
            self.best = [torch.empty_like(parameter.detach(), device="cpu") for parameter in self.parameters]
        here().broadcast(self.best, 0)
        self.share_parameters()

    def share_parameters(self) -> None:
        """Let every process have the first one's latest parameters."""
        here().broadcast([parameter.detach() for parameter in self.parameters], 0)

    def check(self, divergence: float, loss: float | None) -> None:
        """Take in a measurement on held-out text: the parameters are the best where it is the first, or the lowest."""
        self.checks.append(TuningCheck(step=self.step, divergence=divergence, loss=loss))
        if len(self.checks) == 1 or divergence <= min(check.divergence for check in self.checks):
            self.best = [parameter.detach().cpu().clone() for parameter in self.parameters]

    @torch.no_grad()
    def take_best(self) -> None:
        """Make the best parameters those of the model."""
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
