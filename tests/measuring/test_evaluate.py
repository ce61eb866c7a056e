"""Models are judged by perplexity and by lm-eval tasks, without a network."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from commands import call
from dashq import CheckpointError, RecipeError, UsageError
from dashq.measuring.evaluate import (
    Loaded,
    Reference,
    continue_text,
    find_tasks,
    kernel_divergence,
    load_model,
    perplexity,
    read,
    run_tasks,
)
from dashq.results.checkpoint import open_network
from dashq.runtime.kernel_use import packed_layers
from family_results import FamilyResults
from format_results import FormatResults
from lm_tasks import ANSWERS, CHOICES, QUESTIONS, offer_task
from pico import SMALL, pico_model

WINDOWS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(families: FamilyResults) -> Path:
    return families.model("llama-untied-biased")


@pytest.fixture
def loaded(model: Path) -> Loaded:
    return load_model(str(model), dtype="float32")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_configuration_of_more_blocks_than_tensors_is_refused_before_any_is_built(
    quantized: bool, model: Path, results: FormatResults, tmp_path: Path
) -> None:
    folder = shutil.copytree(results["dashq"] if quantized else model, tmp_path / "absurd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    with pytest.raises(CheckpointError, match="says 1000000000000 decoder blocks, where the files hold"):
        load_model(str(folder))


def test_perplexity_is_that_of_every_token_given_those_before_it(loaded: Loaded) -> None:
    heard: list[tuple[int, float]] = []
    result = perplexity(loaded.network, WINDOWS, lambda done, so_far: heard.append((done, so_far)))
    with torch.no_grad():
        chances = loaded.network(WINDOWS).logits.double().softmax(-1)
    losses = [
        -math.log(chances[row, column - 1, WINDOWS[row, column]])
        for row in range(len(WINDOWS))
        for column in range(1, WINDOWS.shape[1])
    ]
    assert result == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert [done for done, _ in heard] == [1, 2, 3]
    assert heard[-1][1] == pytest.approx(result, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.network.get_output_embeddings().weight.zero_()
    assert perplexity(loaded.network, WINDOWS) == pytest.approx(SMALL["vocab_size"], rel=1e-6)


def test_long_windows_are_judged_like_short_ones(loaded: Loaded) -> None:
    """The logits of a long window are taken in pieces."""
    window = torch.randint(0, 300, (1, 256 + 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = functional.cross_entropy(loaded.network(window).logits[0, :-1], window[0, 1:])
    assert perplexity(loaded.network, window) == pytest.approx(math.exp(float(loss)), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gemma3", "gpt2", "mixtral", "bamba"])
def test_a_released_reference_predicts_as_the_whole_model_did(family: str, families: FamilyResults) -> None:
    network = load_model(str(families.model(family)), dtype="float32").network
    reference = Reference(network)
    with reference.reading("text"):
        read(network, WINDOWS)
    with torch.no_grad():
        expected = network(WINDOWS).logits
        reference.release()
        actual = [reference.logits("text", index, WINDOWS[index : index + 1]) for index in range(len(WINDOWS))]
    assert torch.allclose(torch.stack(actual), expected, atol=1e-5)
    blocks = network.base_model.parameters()
    assert sum(parameter.numel() for parameter in blocks if not parameter.is_meta) == 0


def test_divergence_from_a_reference_is_as_its_definition_has_it(loaded: Loaded, families: FamilyResults) -> None:
    other = load_model(str(families.result("llama-untied-biased")), dtype="float32").network
    with torch.no_grad():
        p, q = (network(WINDOWS).logits[:, :-1].double().log_softmax(-1) for network in (loaded.network, other))
    reference = Reference(loaded.network)
    with reference.reading("text"):
        read(loaded.network, WINDOWS)
    reference.release()
    result = read(other, WINDOWS, reference=(reference, "text"))
    assert result.predictions.divergence.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.predictions.agreement.value == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.tokens == WINDOWS.numel()
    assert result.seconds > 0


def test_size_on_disk_counts_the_weights_alone(loaded: Loaded, model: Path) -> None:
    assert loaded.bytes_on_disk == (model / "model.safetensors").stat().st_size


def test_a_prompt_is_continued_by_the_most_likely_tokens_on_one_line(loaded: Loaded) -> None:
    ids = loaded.tokenizer("while x", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, loaded.network(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = loaded.tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    writing = continue_text(loaded, "while x", tokens=5)
    assert (writing.text, writing.tokens) == (" ".join(str(expected).split()), 5)
    assert writing.seconds > 0


def test_a_model_that_no_cache_serves_is_told_from_a_bug(tmp_path: Path) -> None:
    model = pico_model("granitemoehybrid", tmp_path / "model", layer_types=["mamba"] * 3)
    with pytest.raises(CheckpointError, match=r"model cannot continue a text: .*Cache"):
        continue_text(load_model(str(model)), "while x")


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("./absent", {}, CheckpointError, "no such model folder: .*absent"),
        (".", {}, CheckpointError, r"holds no readable config\.json"),
        ("", {"device": "tpu"}, RecipeError, "device: "),
        ("", {"dtype": "int3"}, RecipeError, "dtype: .*'int3'; use auto, float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_opened_is_named(
    name: str,
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        load_model(name or str(model), **options)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_broken_weights_are_named(keep: int, model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{weights} is truncated or not a safetensors file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("label", ["original", "dashq", "mlx"])
def test_broken_generation_settings_are_named(label: str, results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results.model if label == "original" else results[label], tmp_path / "model"))
    (folder / "generation_config.json").write_text("null")
    outcome = call("eval", folder, "--windows", "1", "--context", "32", "--no-original")
    assert outcome.code == 2
    assert f"{folder} cannot be opened: generation_config.json: it holds NoneType, not a mapping" in outcome.errors


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_folder_is_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(model, tmp_path / "other")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="names a shard outside its folder"):
        load_model(str(folder))


@pytest.mark.parametrize("label", ["mlx", "dashq-packed-linear", "Q4_K"])
def test_results_for_other_programs_are_judged_as_they_are_packed(label: str, results: FormatResults) -> None:
    loaded = load_model(str(results[label]), dtype="float32")
    with torch.no_grad():
        expected = open_network(results[label], torch.float32)(WINDOWS).logits
        assert loaded.network(WINDOWS).logits.equal(expected)


def test_a_task_from_a_local_folder_gives_its_metrics(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = run_tasks(loaded, ["pico_choice"], find_tasks(["pico_choice"], offer_task(tmp_path, monkeypatch)))
    chosen = [0 if first_is_likelier(loaded, question, *CHOICES) else 1 for question in QUESTIONS]
    right = [choice == answer for choice, answer in zip(chosen, ANSWERS, strict=True)]
    assert scores["pico_choice"]["acc"] == sum(right) / len(right)


def first_is_likelier(loaded: Loaded, question: str, first: str, second: str) -> bool:
    def likelihood(answer: str) -> float:
        begin = len(loaded.tokenizer.encode(question))
        ids = torch.tensor(loaded.tokenizer.encode(f"{question} {answer}"))
        with torch.no_grad():
            chances = functional.log_softmax(loaded.network(ids[None]).logits[0], dim=-1)
        return float(chances[range(begin - 1, len(ids) - 1), ids[begin:]].sum())

    return likelihood(first) > likelihood(second)


def test_an_unknown_task_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = offer_task(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=r"lm-eval knows no task named pico_choise; `lm-eval ls tasks` lists them"):
        find_tasks(["pico_choice", "pico_choise"], folder)


def test_divergences_are_those_from_the_same_weights_in_float32(families: FamilyResults) -> None:
    pytest.importorskip("auto_round_kernel")
    result = str(families.result("llama-untied-biased"))
    network = load_model(result, dtype="bfloat16", kernels="ark_bfloat16").network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    own, exact = kernel_divergence(network, WINDOWS[0])
    unpacked = load_model(result, dtype="bfloat16", kernels="exact").network
    assert kernel_divergence(unpacked, WINDOWS[0]) == (exact, exact)
    assert own > 0
    assert exact > 0
    assert own != exact
    assert all(network.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert abs(kernel_divergence(load_model(result, dtype="float32", kernels="exact").network, WINDOWS[0])[0]) < 1e-9


def test_a_kernel_is_measured_by_itself_where_many_tokens_would_be_unpacked(families: FamilyResults) -> None:
    result = str(families.result("llama-untied-biased"))
    network = load_model(result, dtype="bfloat16", kernels="lanes").network
    layers = [layer for layer in packed_layers(network) if layer.kernel]
    if not layers:
        pytest.skip("lanes does not work here")
    figures = []
    for many in (math.inf, 1.0):
        for layer in layers:
            layer.many = many
        figures.append(kernel_divergence(network, WINDOWS[0]))
        assert {layer.many for layer in layers} == {many}
    assert figures[0] == figures[1]
    assert figures[0][0] != figures[0][1]


def test_the_size_of_a_result_in_one_file_is_that_of_the_file(results: FormatResults) -> None:
    folder = results["Q4_1"]
    assert load_model(str(folder)).bytes_on_disk == (folder / "model.gguf").stat().st_size
