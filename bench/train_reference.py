"""Train a small model on permissively licensed source text: kivi's reference model, or another.

    python bench/train_reference.py OUT --minutes 8       # one NVIDIA H200
    python bench/train_reference.py OUT --minutes 5 --family qwen2 --layers 4 --hidden 512 \
        --mlp 1408 --heads 4 --kv-heads 4 --head-dim 128 --seed 1

The first is the embedded model, the second one of another shape, with biased keys, to see that a
scheme is no fit to the first. The text is that of the packages installed on the machine; Python's
standard library is held out. The schedule runs on wall time, so that a run ends when its budget
does.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from measure_reference import LENGTHS, measured, passkey_recall, perplexity
from reference_data import (
    BOS,
    CPU_SMOKE,
    STAGES,
    VOCAB,
    Batches,
    encode_documents,
    held_out_text,
    passkey_row,
    shared,
    train_bpe,
    training_text,
    workers,
)
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from kivi.evals.passkey import PasskeyTemplate

RESERVE = 45.0  # seconds kept for saving and measuring
started = time.monotonic()


def say(message: str) -> None:
    print(f"[{time.monotonic() - started:6.1f}s] {message}", flush=True)


def causal_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Training attends to all that came before; no mask is ever built."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal_training", causal_attention)


class Family(StrEnum):
    """Architectures; Qwen 2 is a Llama with biases on queries, keys and values."""

    LLAMA = "llama"
    QWEN2 = "qwen2"


@dataclass(frozen=True)
class Shape:
    """The model's shape."""

    family: Family
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


def new_model(shape: Shape, attention: str = "sdpa") -> Any:
    kind: Any = {Family.LLAMA: LlamaConfig, Family.QWEN2: Qwen2Config}[shape.family]
    config = kind(
        vocab_size=VOCAB,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config)


def save(model: Any, shape: Shape, out: Path) -> None:
    """The float32 weights in training, as a bfloat16 model folder."""
    export = new_model(shape).to(torch.bfloat16)
    export.load_state_dict(model.state_dict())
    export.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    export.save_pretrained(out)


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up, plateau, linear decay to zero."""
    return peak * max(0.0, min(1.0, (progress + 1e-3) / 0.02, (1.0 - progress) / 0.45))


def weighted_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss to train on and the plain mean. hidden [B, T, C], head [V, C], the others [B, T]"""
    logits = F.linear(hidden, head).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum(), losses.detach().mean()


def fit(
    model: Any,
    stages: list[Batches],
    *,
    deadline: float,
    peak: float,
    max_steps: int,
    compiled: bool,
    checkpoint: Callable[[int], None],
) -> list[dict[str, float]]:
    """Train until `deadline` or `max_steps`; progress is the share used. Returns the loss curve."""
    device = stages[0].stream.device
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False)  # equal layers share one graph for each shape

    def backward(batches: Batches) -> Tensor:
        ids, weights = batches.next()
        with torch.autocast(device.type, torch.bfloat16):
            embedded = model.model.embed_tokens(ids[:, :-1]).bfloat16()
            hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            loss, plain = loss_of(hidden, model.lm_head.weight, ids[:, 1:], weights[:, 1:])
        loss.backward()
        return torch.stack([loss.detach(), plain])

    for batches in stages:  # compile every shape before the clock starts
        backward(batches)
        optimizer.zero_grad(set_to_none=True)
        say(f"compiled for length {batches.stage.length}")
    curve: list[dict[str, float]] = []
    recent: list[Tensor] = []
    step = tokens = stage = 0
    begin = saved = time.monotonic()
    while step < max_steps and (now := time.monotonic()) < deadline:
        progress = max((now - begin) / (deadline - begin), step / max_steps)
        while progress >= stages[stage].stage.until:
            stage += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak)
        recent.append(backward(stages[stage]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + stages[stage].stage.batch * stages[stage].stage.length
        if step % 20 == 0:
            weighted, plain = torch.stack(recent).mean(0).tolist()  # waits for the device
            seconds = time.monotonic() - begin
            recent.clear()
            curve.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "length": stages[stage].stage.length,
                    "loss": round(plain, 4),
                    "weighted_loss": round(weighted, 4),
                    "seconds": round(seconds, 1),
                }
            )
            if step % 200 == 0 or max_steps < 100:
                rate = tokens / seconds / 1e6
                say(f"step {step}: loss {plain:.3f}, weighted {weighted:.3f}, {rate:.2f}M tokens/s")
        if time.monotonic() - saved > 60:
            checkpoint(step)
            saved = time.monotonic()
    return curve


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the model; made if missing.")],
    minutes: Annotated[float, typer.Option(help="Wall time of the whole command.")] = 8.0,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    init_from: Annotated[
        Path | None, typer.Option(help="Go on from this model and tokenizer.")
    ] = None,
    family: Annotated[Family, typer.Option(help="qwen2: biased queries, keys, values.")] = (
        Family.LLAMA
    ),
    layers: int = 6,
    hidden: int = 384,
    mlp: int = 1024,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
    smoke: Annotated[bool, typer.Option(help="A tiny corpus and 20 steps.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Build the corpus and the tokenizer, train, save the model folder OUT and measure it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = started + minutes * 60 - RESERVE
    shape = Shape(family, layers, hidden, mlp, heads, kv_heads, head_dim)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(held_out_text(400_000), "utf-8")
    texts, packages = training_text(420e6, 600 if smoke else None)
    characters = sum(map(len, texts))
    say(f"{len(texts)} files, {characters / 1e6:.1f}M characters, {len(packages)} packages")
    if init_from:
        tokenizer = AutoTokenizer.from_pretrained(init_from)
    else:
        bpe = train_bpe(texts, 1e6 if smoke else 30e6)
        fast: Any = PreTrainedTokenizerFast
        tokenizer = fast(
            tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=4096
        )
    tokenizer.save_pretrained(out)
    say("tokenizer ready")
    shared["bpe"] = tokenizer.backend_tokenizer
    with workers() as pool:
        groups = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        pieces = pool.map(encode_documents, groups, chunksize=1)
    shared["stream"] = torch.from_numpy(np.concatenate(pieces))
    shared["template"] = PasskeyTemplate.from_encode(
        lambda s: tokenizer.encode(s, add_special_tokens=False), 0
    )
    say(f"{len(shared['stream']) / 1e6:.1f}M tokens, {len(shared['template'].names)} passkey names")
    plan = CPU_SMOKE if smoke and device == "cpu" else STAGES
    made = []
    with workers() as pool:
        for stage in plan:
            seeds = range(stage.length * 1_000_000, stage.length * 1_000_000 + stage.pool)
            jobs = [(seed, stage.length + 1) for seed in (seeds[:16] if smoke else seeds)]
            made.append(pool.map(passkey_row, jobs, chunksize=16))
    stream = shared["stream"].to(device)
    stages = []
    for stage, rows in zip(plan, made, strict=True):
        ids, weights = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*rows, strict=True))
        stages.append(Batches(stage, stream, ids, weights))
    say("passkey rows ready")

    model = new_model(shape, "causal_training").to(device)
    if init_from:
        start = AutoModelForCausalLM.from_pretrained(init_from, dtype=torch.float32)
        model.load_state_dict(start.state_dict())
    text = (out / "heldout.txt").read_text("utf-8")
    held_out = torch.tensor(shared["bpe"].encode(text, add_special_tokens=False).ids)

    def checkpoint(step: int) -> None:
        save(model, shape, out)
        with torch.compiler.set_stance("force_eager"):
            ppl = perplexity(model, held_out[:40_000], 1024)
            keys = [passkey_recall(model, held_out, shared["template"], n, 20) for n in LENGTHS]
        say(f"checkpoint at step {step}: perplexity {ppl:.2f}, passkey {keys}")

    curve = fit(
        model,
        stages,
        deadline=deadline,
        peak=peak,
        max_steps=20 if smoke else 1_000_000,
        compiled=compiled,
        checkpoint=checkpoint,
    )
    save(model, shape, out)
    say("saved")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    report = {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus": {
            "files": len(texts),
            "characters": characters,
            "tokens": len(stream),
            "packages": packages,
        },
        "shape": asdict(shape),
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_learning_rate": peak,
        "stages": [vars(stage) for stage in plan],
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1))
    report["measured"] = (
        measured(out, device, 4, 2, (512,)) if smoke else measured(out, device, 200, 32)
    )
    (out / "training.json").write_text(json.dumps(report, indent=1))
    say(json.dumps(report["measured"], indent=1))


if __name__ == "__main__":
    typer.run(main)
