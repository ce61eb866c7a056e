"""Train the small mixture of experts that tests and benches measure on, from scratch on English documentation.

A Mixtral of 3 million parameters: 4 blocks of 8 experts, each token to 2 of them, with the load-balancing loss of
transformers. The text is always there: Python's help topics, the test split held out, and the docstrings of the
standard library and of packages that dashq needs. Training goes on after its last checkpoint when started again.
"""

import argparse
import ast
import importlib.util
import random
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from bench._record import result_line
from dashq.calibration.sources import read_documents
from dashq.calibration.tokens import evaluation_windows
from dashq.measuring.evaluate import perplexity
from dashq.text_source import TextSource

FOLDER = Path("tests/data/mixture")
PACKAGES = ("huggingface_hub", "torch", "transformers")
TOPIC_COPIES = 6  # the topics are what is measured on, and a twentieth of the text
VOCABULARY = 1024
CONTEXT = 128
BATCH = 24
WARMUP = 100
SAVE_EVERY_SECONDS = 60


def main() -> None:
    """Train for so many steps, keep weights and tokenizer, and print what the model has learned."""
    parser = argparse.ArgumentParser(prog="python -m bench mixture", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=30, help="stop after so long, to be started again")
    parser.add_argument("--rate", type=float, default=3e-3, help="the largest learning rate")
    parser.add_argument("--work", type=Path, default=Path("out/mixture"), help="where text and checkpoints are kept")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the trained model goes")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer, stream = _text(arguments.work)
    model, seconds, finished = train(
        stream, arguments.work / "checkpoint.pt", arguments.steps, arguments.minutes, arguments.rate
    )
    if not finished:
        return
    if arguments.folder.exists():
        shutil.rmtree(arguments.folder)
    model.bfloat16().save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    figures = {"steps": arguments.steps, "tokens": arguments.steps * BATCH * CONTEXT, "training_seconds": seconds}
    print(result_line(figures | describe(arguments.folder, tokenizer, stream)))


def train(
    stream: Tensor, checkpoint: Path, steps: int, minutes: float, rate: float
) -> tuple[MixtralForCausalLM, float, bool]:
    """The model, the seconds of training so far, and whether it is finished."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(_config()).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARMUP / steps)
    first, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, spent = saved["step"], saved["seconds"]
    start = last_saved = time.perf_counter()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        places = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        batch = stream[places + torch.arange(CONTEXT)].long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
        now = time.perf_counter()
        if now - last_saved > SAVE_EVERY_SECONDS or now - start > 60 * minutes:
            _save(checkpoint, step + 1, spent + now - start, model=model, optimizer=optimizer, schedule=schedule)
            last_saved = now
        if now - start > 60 * minutes:
            return model, spent + now - start, False
    return model.eval(), spent + time.perf_counter() - start, True


@torch.inference_mode()
def describe(folder: Path, tokenizer: PreTrainedTokenizerFast, stream: Tensor) -> dict[str, object]:
    """Perplexity on held-out text beside that of a unigram model, and the tokens of every expert."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = evaluation_windows(TextSource(name="pydoc", split="test"), tokenizer, CONTEXT, None)
    logits = network(input_ids=windows[:64], use_cache=False, output_router_logits=True).router_logits
    experts = network.config.num_local_experts
    chosen = [torch.bincount(x.topk(2).indices.flatten(), minlength=experts) for x in logits]
    counts = torch.bincount(stream.long(), minlength=VOCABULARY).double() + 1
    unigram = (counts / counts.sum()).log()
    return {
        "parameters": network.num_parameters(),
        "perplexity": perplexity(network, windows),
        "unigram_perplexity": float((-unigram[windows[:, 1:]].mean()).exp()),
        "tokens_per_expert": [count.tolist() for count in chosen],
        "held_out_tokens": windows.numel(),
    }


def _config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def _text(work: Path) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """The tokenizer, learned from the text, and the text as one stream of tokens."""
    if not (work / "stream.pt").exists():
        documents = [str(document) for document in read_documents(TextSource(name="pydoc", split="train"))]
        documents = TOPIC_COPIES * documents + list(_docstrings())
        random.Random(0).shuffle(documents)
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        tokenizer.save_pretrained(work / "tokenizer")
        ids = [[*encoding.ids, 0] for encoding in backend.encode_batch(documents)]
        joined = [token for document in ids for token in document]
        torch.save(torch.tensor(joined, dtype=torch.int16), work / "stream.pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    return tokenizer, torch.load(work / "stream.pt", weights_only=True)


def _docstrings() -> Iterator[str]:
    """The long docstrings of the standard library and of some packages, each once; nothing is imported."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folders.append(Path(spec.origin).parent)
    seen: Counter[str] = Counter()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if {"site-packages", "test", "tests", "pydoc_data"} & set(path.relative_to(folder).parts):
                continue
            try:
                tree = ast.parse(path.read_text())
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    seen[text] += 1
                    if len(text) > 200 and seen[text] == 1:
                        yield text


def _save(path: Path, step: int, seconds: float, **parts: Any) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"step": step, "seconds": seconds}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
