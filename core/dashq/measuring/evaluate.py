"""Judge a model: perplexity on any text source, lm-eval tasks, a generated sentence."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dashq.calibration.tokens import evaluation_windows
from dashq.device import choose_device, choose_dtype, in_words, wait_for
from dashq.errors import MissingPackageError, UsageError, one_line, refusing
from dashq.measuring.predictions import PredictionFigures, exponential
from dashq.model.capacity import check_length, check_tokens
from dashq.model.files import read_gguf_network
from dashq.model.loading import check_size, read_config, read_network, read_tokenizer
from dashq.model.location import Location, locate
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import Shards, check_index, weight_files
from dashq.model.tokenizing import beginning_tokens
from dashq.model.transformers_internals import can_unpack
from dashq.recipe.recipe import Beginning
from dashq.results.checkpoint import is_packed, open_checkpoint, open_network
from dashq.runtime.kernel_choice import AUTO, check_kernels
from dashq.runtime.kernel_use import exactly, packed_layers, packed_throughout
from dashq.runtime.quantizer import QUANT_METHOD
from dashq.text_source import TextSource

CONTINUATION = 24  # tokens with which a model continues a prompt


@dataclass(frozen=True, eq=False)
class Loaded:
    """A whole model in memory, ready to judge."""

    name: str
    network: Any  # a PreTrainedModel, whose own annotations do not let it generate
    tokenizer: PreTrainedTokenizerBase
    location: Location

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the files that hold the weights."""
        if self.location.gguf:
            return (self.location.folder / self.location.gguf).stat().st_size
        folder = self.location.folder
        trusted = self.location.trust_remote_code
        container = open_checkpoint(folder, None, trusted).container if is_packed(folder) else None
        files = [folder / container.file] if container else weight_files(folder)
        return sum(path.stat().st_size for path in files)

    @property
    def computed(self) -> str:
        """The device and the type that the model computes with, in words."""
        return in_words(self.network.device, self.network.dtype)


@without_progress_bars()
def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    download: bool = True,
    kernels: str = AUTO,
) -> Loaded:
    """Open an original or a quantized model through transformers; quantized layers stay packed.

    Packed weights that transformers does not read open with dashq's own layers. Code that lies beside the weights runs
    only with `trust_remote_code`, `kernels` multiply with packed layers as `use_kernels` has them, and a model of the
    hub that is not here is fetched only with `download`. Raises `CheckpointError` where there is no such model or it
    cannot be opened.
    """
    check_kernels(kernels)
    location = locate(name, trust_remote_code, download)
    place = choose_device(device)
    computed = choose_dtype(dtype, place)
    network: Any
    if location.gguf:
        network = read_gguf_network(location, computed)
    elif _is_for_dashq_alone(location):
        network = open_network(location.folder, computed, trust_remote_code=trust_remote_code, kernels=kernels)
    else:
        check_index(location.folder)  # transformers would follow it out of the folder
        config = read_config(location)
        check_size(location, config, len(Shards(location.folder).headers()))
        settings = getattr(config, "quantization_config", None)
        options = {}
        if isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD:
            settings["kernels"] = kernels
            options["config"] = config
        network = read_network(location, dtype=computed, **options)
    return Loaded(name, network.to(place).eval(), read_tokenizer(location), location)


def _is_for_dashq_alone(location: Location) -> bool:
    """True for quantized models that transformers would not recognise as such, or lacks a package for.

    Of the former it would make the weights up.
    """
    if not is_packed(location.folder):
        return False
    settings = getattr(read_config(location), "quantization_config", None)
    return settings is None or not (settings.get("quant_method") == QUANT_METHOD or can_unpack(settings))


def read_windows(
    location: Location, sources: Sequence[TextSource], context: int, limit: int | None, beginning: Beginning = "auto"
) -> Mapping[str, Int64[Tensor, "windows context"]]:
    """The windows of each source by its name, for the model at `location`, of which no weight is read.

    Raises `TextError` where a source cannot be read or is too short, or the model cannot take such tokens.
    """
    if not sources:
        return {}
    config, tokenizer = read_config(location), read_tokenizer(location)
    check_length(context, config, "--context")
    texts = {source.name: evaluation_windows(source, tokenizer, context, limit, beginning) for source in sources}
    for windows in texts.values():
        check_tokens(windows, config, tokenizer)
    return texts


def check_prompt(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Raise a `TextError` where a model cannot take a prompt and its continuation."""
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
    check_length(ids.numel() + CONTINUATION, config, "--prompt: with its continuation,")
    check_tokens(ids, config, tokenizer)


class Reference:
    """The predictions of a model that others are compared with: its last hidden states, and the head behind them.

    It reads the windows of texts while the model is whole. Once released, it holds in memory only these states and what
    lies behind the blocks, so that another model has room beside it.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self._network, self._decoder, self._device = network, network.base_model, network.device
        self._states: dict[str, list[Float[Tensor, "1 context width"]]] = {}
        self._output: Any = None  # of the decoder, in which the states of a window are put

    @contextmanager
    def reading(self, text: str) -> Generator[None]:
        """Keep the states of all windows of a text that the network is given within the `with` statement."""
        states = self._states[text] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append(output[0].cpu())
            self._output = output

        handle = self._decoder.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def release(self) -> None:
        """Give up the memory of all but the states and the head; the network is no use for anything else then."""
        vars(self._decoder)["forward"] = lambda *args, **kwargs: self._output
        self._decoder.to("meta")  # a head that shares the embeddings keeps them

    def logits(self, text: str, index: int, window: Int64[Tensor, "1 context"]) -> Float[Tensor, "context words"]:
        """The predictions for a window that was read, once the model is released."""
        self._output["last_hidden_state"] = self._states[text][index].to(self._device)
        logits: Tensor = self._network(window.to(self._device), use_cache=False).logits[0]
        return logits


@dataclass(frozen=True, eq=False)
class Reading:
    """The predictions of a model for the windows of a text, and the seconds that it computed."""

    predictions: PredictionFigures
    tokens: int
    seconds: float


@torch.inference_mode()
def read(
    network: PreTrainedModel,
    windows: Int64[Tensor, "windows context"],
    listen: Callable[[int, float], None] = lambda done, so_far: None,
    unjudged: int = 1,
    reference: tuple[Reference, str] | None = None,
) -> Reading:
    """Predict each token of each window from those before it, beside a released reference's reading of a text.

    The first `unjudged` tokens of every window count only as what was before. `listen` hears the number of
    windows done and the perplexity so far.
    """
    predictions, seconds = PredictionFigures(), 0.0
    for index, window in enumerate(windows.split(1)):
        start = time.perf_counter()
        window = window.to(network.device)
        logits = network(window, use_cache=False).logits[0]
        wait_for(network.device)
        seconds += time.perf_counter() - start
        expected = None
        if reference:
            other, text = reference
            expected = other.logits(text, index, window)[unjudged - 1 : -1]
        predictions.add(logits[unjudged - 1 : -1], window[0, unjudged:], expected)
        listen(index + 1, exponential(predictions.loss)[0] or math.nan)
    return Reading(predictions, windows.numel(), seconds)


def perplexity(
    network: PreTrainedModel,
    windows: Int64[Tensor, "windows context"],
    listen: Callable[[int, float], None] = lambda done, so_far: None,
    unjudged: int = 1,
) -> float:
    """exp of the mean negative log-likelihood of each token given those before it, as `read` takes them.

    NaN where predictions are no numbers.
    """
    value, _ = exponential(read(network, windows, listen, unjudged).predictions.loss)
    return math.nan if value is None else value


@torch.inference_mode()
def kernel_divergence(network: PreTrainedModel, window: Int64[Tensor, " context"]) -> tuple[float, float]:
    """The mean divergences KL(p, q) of a network's predictions q from p, its own computed in float32.

    The first is that with its kernels, the second that with unpacked weights, which the network's type rounds as well.
    Weights are unpacked for p, and what else the network holds is for a while in memory in float32 as well.
    """
    ids = window.to(network.device)[None]
    with packed_throughout(network):  # a window has so many tokens that layers would be unpacked
        own = network(ids, use_cache=False).logits[0]
    packed = {id(tensor) for layer in packed_layers(network) for tensor in layer.buffers()}
    others = {
        name: tensor.float()
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if tensor.is_floating_point() and id(tensor) not in packed
    }
    with exactly(network):
        exact = network(ids, use_cache=False).logits[0]
        reference = functional_call(network, others, (ids,), {"use_cache": False}).logits[0]
    return _mean_divergence(reference, own), _mean_divergence(reference, exact)


def _mean_divergence(p: Float[Tensor, "tokens vocabulary"], q: Float[Tensor, "tokens vocabulary"]) -> float:
    """The mean over tokens of KL(p, q) of logits, a few hundred tokens at a time, since vocabularies are large."""
    total = 0.0
    for expected, logits in zip(p.split(256), q.split(256), strict=True):
        logs = [part.double().log_softmax(-1) for part in (logits, expected)]
        total += float(functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True))
    return total / len(p)


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """lm-eval's manager of its own tasks and those of a folder, which takes seconds to make.

    Raises `MissingPackageError` where lm-eval is not installed, `UsageError` where a task or the folder is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError(
            f"--tasks needs lm-eval, which is not installed: pip install 'dashq[eval]' ({error})"
        ) from error
    if include_path and not include_path.is_dir():
        raise UsageError(f"there is no folder of tasks {include_path.absolute()}")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"lm-eval knows no task named {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return manager


def run_tasks(
    loaded: Loaded, tasks: Sequence[str], manager: Any, limit: int | None = None
) -> Mapping[str, Mapping[str, float]]:
    """lm-eval's metrics of each task by name; `manager` is from `find_tasks`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    untyped: Any = HFLM
    begins = bool(beginning_tokens(loaded.tokenizer, "auto"))
    model = untyped(pretrained=loaded.network, tokenizer=loaded.tokenizer, add_bos_token=begins)
    evaluate: Any = lm_eval.simple_evaluate
    results = evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit)
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
        for task, values in results["results"].items()
    }


@dataclass(frozen=True)
class Writing:
    """A model's continuation of a prompt, on one line, and how many tokens it took in how many seconds."""

    text: str
    tokens: int
    seconds: float


@torch.inference_mode()
def continue_text(loaded: Loaded, prompt: str, tokens: int = CONTINUATION) -> Writing:
    """The model's most likely continuation of a prompt by at most `tokens` tokens.

    Raises `CheckpointError` where transformers cannot let the model generate.
    """
    tokenizer = loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt").to(loaded.network.device)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    start = time.perf_counter()
    with refusing(f"{loaded.name} cannot continue a text"):  # transformers' caches do not serve every model
        output = loaded.network.generate(**ids, **options)[0, ids["input_ids"].shape[1] :].cpu()
    seconds = time.perf_counter() - start
    return Writing(one_line(tokenizer.decode(output, skip_special_tokens=True)), len(output), seconds)
