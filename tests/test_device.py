"""A device and a type are chosen by name, and a name that is none is refused with those that are."""

import gc
import os
from pathlib import Path

import pytest
import torch

import dashq.device
from dashq import RecipeError
from dashq.device import (
    DTYPES,
    choose_device,
    choose_dtype,
    free_memory,
    give_back_memory,
    in_words,
    limit_kernel_caches,
    type_name,
    wait_for,
)

CPU = torch.device("cpu")
CPUINFO, STATM = Path("/proc/cpuinfo"), Path("/proc/self/statm")
linux = pytest.mark.skipif(not STATM.exists(), reason="only Linux says how much memory a process has")


@pytest.fixture
def without_graphics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_graphics_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("without_graphics")
def test_without_a_graphics_processor_auto_is_the_cpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.usefixtures("two_graphics_processors")
def test_auto_is_a_graphics_processor_where_there_is_one_and_the_cpu_can_still_be_asked_for() -> None:
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU


@pytest.mark.usefixtures("two_graphics_processors")
def test_each_process_of_a_machine_has_a_graphics_processor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match=r"^device: 'cuda:2' is not available here; use auto, cpu or cuda:0, cuda:1$"):
        choose_device("auto")


@pytest.mark.usefixtures("two_graphics_processors")
def test_more_processes_than_graphics_processors_are_refused_unless_they_compute_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("auto", "cuda"):
        with pytest.raises(RecipeError) as error:
            choose_device(name)
        assert str(error.value) == (
            "device: each of 4 processes takes a graphics processor of its own, and here are 2: start as many, or use "
            "cpu"
        )
    assert choose_device("cpu") == CPU


@pytest.mark.usefixtures("without_graphics")
def test_one_graphics_processor_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError) as error:
        choose_device("cuda:1")
    assert str(error.value) == (
        "device: 'cuda:1' is one graphics processor, and each of 2 processes takes its own; use auto, cuda or cpu"
    )
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"^device: '{name}' is not available here; use auto or cpu$"):
        choose_device(name)


@pytest.mark.usefixtures("two_graphics_processors")
def test_a_graphics_processor_too_many_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(RecipeError, match=r"^device: 'cuda:2' is not available here; use auto, cpu or cuda:0, cuda:1$"):
        choose_device("cuda:2")
    with pytest.raises(RecipeError, match=r"^device: 'mps' is not available here; use auto or cpu$"):
        choose_device("mps")


@pytest.mark.parametrize("name", ["", "gpu", "0", "CPU", "cuda:-1", "cuda:one", "cuda:99999999999"])
def test_what_is_no_device_is_refused_with_the_names_of_devices(name: str) -> None:
    with pytest.raises(RecipeError, match=f"^device: no device is named '{name}'; use auto, cpu, cuda or cuda:N$"):
        choose_device(name)


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_goes_by_the_name_that_torch_gives_it(name: str) -> None:
    assert str(choose_dtype(name, CPU)) == f"torch.{name}"


@pytest.mark.parametrize("name", ["", "int8", "float64", "bf16", "torch.float32"])
def test_what_nothing_is_computed_in_is_refused_with_the_types_that_are(name: str) -> None:
    message = f"^dtype: nothing is computed in '{name}'; use auto, float32, bfloat16, float16$"
    with pytest.raises(RecipeError, match=message):
        choose_dtype(name, CPU)


@pytest.mark.skipif(not CPUINFO.exists(), reason="only Linux says what its processor multiplies")
def test_auto_is_bfloat16_exactly_where_the_processor_multiplies_it() -> None:
    words = set(CPUINFO.read_text().split())
    multiplies = bool(words & {"avx512_bf16", "amx_bf16"})
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if multiplies else torch.float32)


def test_types_are_named_as_in_recipes() -> None:
    assert [type_name(dtype) for dtype in DTYPES.values()] == list(DTYPES)


def test_device_and_type_are_told_in_words() -> None:
    assert in_words(CPU, torch.bfloat16) == "on cpu in bfloat16"
    assert in_words(torch.device("cuda:1"), torch.float32) == "on cuda:1 in float32"


def test_nothing_is_waited_for_on_the_cpu_and_no_graphics_processor_is_woken() -> None:
    initialized = torch.cuda.is_initialized()
    wait_for(CPU)
    assert torch.cuda.is_initialized() == initialized


def test_few_kernels_are_kept_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    limit_kernel_caches()
    kept = {name: os.environ[name] for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")}
    assert kept == {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}


@linux
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Pieces that are too small for the system to be asked for each, and one at the end that keeps the heap from
    # shrinking by itself.
    pieces = [bytearray(100_000) for _ in range(1000)]
    last = bytearray(100_000)
    pieces.clear()
    gc.collect()
    before = resident()
    give_back_memory()
    assert resident() < before - 50_000_000
    assert len(last) == 100_000


@linux
def test_free_memory_is_that_of_the_machine_or_of_what_the_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(dashq.device, "CONTROL_GROUP", tmp_path)
    assert 0 < free_memory(CPU) < total
    for name, content in (("max", "max"), ("current", "700"), ("stat", "anon 500\ninactive_file 150\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert 0 < free_memory(CPU) < total
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(CPU) == 1000 - 700 + 150  # what is only cached gives way
