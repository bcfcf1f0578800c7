"""Measure a reference model folder: held-out perplexity, passkey recall, the order of KIVI's axes.

    python bench/measure_reference.py kivi/evals/reference

Everything in float32 with transformers' own cache, so that the numbers do not depend on kivi's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kivi.evals.passkey import PasskeyTemplate, passkey_batch, recall

LENGTHS = (1024, 2048, 4096)
AXES = ("channel/token", "token/token", "channel/channel", "token/channel")  # of keys / of values


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, context: int) -> float:
    """Per token, over windows without overlap that each start with BOS. ids [N]"""
    width = context - 1
    rows = F.pad(ids[: len(ids) // width * width].view(-1, width), (1, 0)).to(model.device)
    losses = [F.cross_entropy(model(r[None]).logits[0, :-1].float(), r[1:]).item() for r in rows]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def passkey_recall(
    model: Any,
    text: Tensor,
    template: PasskeyTemplate,
    length: int,
    count: int,
    distractors: int = 0,
) -> float:
    """Greedy exact match of all five digits, at depths spread evenly over the prompt. text [N]"""
    depths = [(i + 0.5) / count for i in range(count)]
    kind: dict[str, Any] = {"length": length, "seed": 7, "distractors": distractors}
    samples = passkey_batch(text, template, depths=depths, **kind)
    # One pass is enough: greedy decoding is right if each digit ranks first after the true ones.
    logits = [model(s.ids[None, :-1].to(model.device)).logits[0, -5:] for s in samples]
    return recall(
        torch.stack(logits).argmax(-1).cpu(), torch.stack([s.answer_ids for s in samples])
    )


def fake_quantize(x: Tensor, axis: str, bits: int, group: int = 32) -> Tensor:
    """Min-max, there and back: "channel" groups tokens, "token" groups channels. x [B, H, T, D]"""
    dim = -2 if axis == "channel" else -1
    grouped = x.unflatten(dim, (-1, group))
    low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((grouped - zero) / scale.clamp_min(1e-8)).round().clamp(0, 2**bits - 1)
    restored: Tensor = (codes * scale + zero).view_as(x)
    return restored


@torch.no_grad()
def axes_kl(
    model: Any, ids: Tensor, rows: int, context: int = 1024, bits: int = 2
) -> dict[str, float]:
    """Mean KL to full precision over 64 tokens after a quantized prefix. ids [N]

    The prefix is fake-quantized once, with its last 128 tokens exact.
    """
    total = dict.fromkeys(AXES, 0.0)
    for row in range(rows):
        at = row * (len(ids) - context - 64) // max(rows - 1, 1)
        text = F.pad(ids[at : at + context + 63], (1, 0))[None].to(model.device)
        cache: Any = DynamicCache(config=model.config)
        model(text[:, :context], past_key_values=cache)
        exact = [(layer.keys, layer.values) for layer in cache.layers]
        target = model(text[:, context:], past_key_values=cache).logits.log_softmax(-1)
        for name in AXES:
            cache = DynamicCache(config=model.config)
            for i, pair in enumerate(exact):
                past = []
                for x, axis in zip(pair, name.split("/"), strict=True):
                    coarse = fake_quantize(x[:, :, :-128], axis, bits)
                    past.append(torch.cat([coarse, x[:, :, -128:]], dim=2))
                cache.update(*past, i)
            got = model(text[:, context:], past_key_values=cache).logits.log_softmax(-1)
            kl = F.kl_div(got, target, log_target=True, reduction="sum").item() / 64
            total[name] += kl / rows
    return {name: round(value, 5) for name, value in total.items()}


def measured(
    folder: Path, device: str, samples: int, rows: int, lengths: Sequence[int] = LENGTHS
) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_text("utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    template = PasskeyTemplate.from_encode(
        lambda s: tokenizer.encode(s, add_special_tokens=False), 0
    )
    found: dict[str, Any] = {"heldout_bytes": len(text.encode()), "heldout_tokens": len(ids)}
    for length in lengths:
        found[f"perplexity_{length}"] = round(perplexity(model, ids, length), 4)
        found[f"passkey_{length}"] = round(passkey_recall(model, ids, template, length, samples), 4)
        hard = passkey_recall(model, ids, template, length, samples, distractors=3)
        found[f"passkey_{length}_3_distractors"] = round(hard, 4)
    found["kl_2_bits_key_axis/value_axis"] = axes_kl(model, ids, rows)
    return found


def main(folder: Path, device: str = "cpu", samples: int = 100, rows: int = 16) -> None:
    """Print held-out perplexity, passkey recall and the KL of the axes, all in float32."""
    print(json.dumps(measured(folder, device, samples, rows), indent=1))


if __name__ == "__main__":
    typer.run(main)
