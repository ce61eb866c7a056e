"""The pretended device refuses what CUDA refuses, allows what CUDA allows, and computes the same numbers."""

import copy
from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pretend_device import DEVICE, pretended_device


@pytest.fixture(autouse=True)
def _pretended() -> Generator[None]:
    with pretended_device():
        yield


def here() -> Tensor:
    return torch.arange(6.0).reshape(2, 3).to("cuda")


def there() -> Tensor:
    return torch.ones(2, 3)


MIXTURES: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: here() + there(),
    "a number of the device": lambda: there() * here().sum(),
    "a product": lambda: here() @ there().T,
    "a comparison of all": lambda: torch.equal(here(), there()),
    "a result that lies on the CPU": lambda: torch.add(here(), here(), out=there()),
    "a change of what lies on the CPU": lambda: there().add_(here()),
    "a change of a number on the CPU": lambda: torch.tensor(0.0).add_(here().sum()),
    "a stack with a number": lambda: torch.stack([here().sum(), torch.tensor(0.0)]),
    "a list": lambda: torch.cat([here(), there()]),
    "an index of the device": lambda: there()[torch.tensor([0]).to("cuda")],
    "values at an index": lambda: here().__setitem__(torch.tensor([0]), there()),
    "an embedding": lambda: functional.embedding(torch.tensor([0]), here()),
    "a layer that was left behind": lambda: nn.Linear(3, 2)(here()),
    "noise": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_what_does_not_go_together_is_refused(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"^Expected all tensors to be on the same device|^Expected a generator"):
        MIXTURES[what]()


def test_numpy_reads_no_other_memory() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        here().numpy()
    assert here().cpu().numpy().tolist() == here().tolist() == [[0, 1, 2], [3, 4, 5]]


ON_THE_DEVICE: dict[str, Callable[[], Tensor]] = {
    "a number from the CPU": lambda: torch.tensor(2.0) * here(),
    "an index from the CPU": lambda: here()[torch.tensor([1])],
    "a choice": lambda: here()[here() > 2],
    "a view": lambda: here().mT[1:],
    "what is made like it": lambda: torch.zeros_like(here()),
    "what is made for it": lambda: here().new_tensor([1.0]),
    "what is made there": lambda: torch.arange(3, device="cuda:0"),
    "noise of its own": lambda: torch.randn(3, device="cuda", generator=torch.Generator("cuda")),
    "what follows another": lambda: there().to(here()),
    "a parameter": lambda: nn.Parameter(here()),
    "a layer's weight": lambda: nn.Linear(3, 2).to("cuda").weight,
    "a copy of a layer": lambda: copy.deepcopy(nn.Linear(3, 2).to(DEVICE)).weight,
    "a part": lambda: here().split(1)[1],
    "a gradient": lambda: torch.autograd.grad(nn.Linear(3, 2).cuda()(x := here().requires_grad_()).sum(), x)[0],
}


@pytest.mark.parametrize("what", ON_THE_DEVICE)
def test_what_comes_of_the_device_lies_there(what: str) -> None:
    tensor = ON_THE_DEVICE[what]()
    assert tensor.device == DEVICE
    assert tensor.is_cuda
    assert tensor.cpu().device.type == "cpu"


def test_the_default_device_can_be_set() -> None:
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
    assert not torch.zeros(2).is_cuda


def test_memory_is_copied_and_not_shared() -> None:
    source = there()
    moved, parameter, into_slice = source.to("cuda"), nn.Parameter(there()), here()
    source.zero_()
    parameter.data = parameter.data.to(DEVICE, torch.float64)
    into_slice[0] = torch.ones(3)
    assert moved.tolist() == parameter.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert parameter.is_cuda
    assert parameter.dtype == torch.float64
    assert there().copy_(into_slice).tolist() == [[1, 1, 1], [3, 4, 5]]
