"""Masks of every kind, dtypes and gradients: packed or dense, never silently wrong."""

from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, close, forward, generate, prompt, state, tiny
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from kivi import hf_attention
from kivi.hf import KVCache


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def four_masks(kind: str, start: int, end: int) -> Tensor:
    """Masks `[2, H, end - start, end]` of transformers' fourth dimension."""
    query, column = torch.arange(start, end)[:, None], torch.arange(end)
    mask = (column <= query).expand(2, 1, -1, -1)
    if kind == "window of a tree":
        return mask & ((column % 7 != 3) | (column == query))
    if kind == "images":  # tokens of one image see each other
        return mask | ((column // 16 == query // 16) & (column // 16 % 2 == 1))
    if kind == "other window":
        return mask & (column > query - 20)
    if kind == "heads":
        return mask & ((column % 2 == 0) | (column == query) | (torch.arange(4)[:, None, None] > 1))
    assert kind == "numbers"
    return torch.where(mask, torch.sin(column.float()), torch.finfo(torch.float32).min)


@pytest.mark.filterwarnings("ignore:.*needs dense keys")
@pytest.mark.parametrize("kind", ["window of a tree", "images", "other window", "heads", "numbers"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_masks_of_ones_own(name: str, kind: str) -> None:
    """What packed attention cannot do is done densely, with the model's own values."""
    model = tiny(name)
    ids = prompt(tokens=96)["input_ids"]
    reference, logits = DynamicCache(), []
    chunks = ((0, 64), (64, 95), (95, 96))
    model.set_attn_implementation("eager")

    def masks(start: int, end: int, numbers: bool) -> Tensor:
        mask = four_masks(kind, start, end)
        if numbers and mask.dtype == torch.bool:
            return torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return mask

    for start, end in chunks:
        mask = masks(start, end, numbers=True)
        logits.append(forward(model, reference, ids[:, start:end], attention_mask=mask))
    cache = KVCache(model, LOSSLESS)
    for (start, end), expected in zip(chunks, logits, strict=True):
        mask = masks(start, end, numbers=False)
        close(forward(model, cache, ids[:, start:end], attention_mask=mask), expected)
    full = 1 if "sliding" in str(getattr(model.config, "layer_types", "")) else 0
    dense = {"images": 0, "window of a tree": 3, "other window": 3, "heads": 3, "numbers": 3}[kind]
    if kind in ("images", "heads", "numbers"):
        assert cache.dense_calls[full] == dense
    assert cache.packed_calls[full] + cache.dense_calls[full] == 3


def test_mask_written_in_place() -> None:
    """One buffer for the masks of all steps, as in static loops; the first row has padding."""
    model, inputs = tiny("llama"), prompt(tokens=60, padding=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    position = (mask.cumsum(1) - 1).clamp_min(0)
    expected = forward(model, None, ids, attention_mask=mask, position_ids=position)
    with torch.inference_mode():
        frozen = torch.zeros(2, 1, 1, 64, dtype=torch.bool)
    buffers = torch.zeros(2, 1, 1, 64, dtype=torch.bool), frozen
    cache = KVCache(model, LOSSLESS, max_length=64)
    for i in range(60):
        with torch.inference_mode():
            for buffer in buffers:
                buffer[:, 0, 0, i] = mask[:, i]
        new = slice(i, i + 1)
        inputs = {"attention_mask": buffers[i % 2], "position_ids": position[:, new]}
        mine = forward(model, cache, ids[:, new], **inputs)
        close(mine[mask[:, i], 0], expected[mask[:, i], i])
    assert cache.packed_calls == [60, 60]


@pytest.mark.filterwarnings("ignore:.*needs dense keys")
@pytest.mark.parametrize("padding", [0, 20])
def test_bidirectional(padding: int) -> None:
    """A decoder that is set to see both ways, within what it is given at once."""
    model = tiny("llama", is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    inputs = prompt(padding=padding)
    inputs["ids"] = inputs.pop("input_ids")
    valid = inputs["attention_mask"].bool()
    expected = forward(model, DynamicCache(config=model.config), **inputs)
    close(forward(model, KVCache(model, LOSSLESS), **inputs)[valid], expected[valid])
    close(forward(model, None, **inputs)[valid], expected[valid])


def test_prefill_in_chunks(llama: PreTrainedModel) -> None:
    inputs = prompt(padding=30)
    whole, chunks = KVCache(llama, LOSSLESS), KVCache(llama, LOSSLESS)
    said = generate(llama, whole, inputs)
    assert torch.equal(generate(llama, chunks, inputs, prefill_chunk_size=33), said)
    torch.testing.assert_close(state(chunks), state(whole))


def test_autocast() -> None:
    """Rotated keys come in float32 there and values in bfloat16; attention is in bfloat16."""
    model, inputs = tiny("llama"), prompt(padding=30)
    valid = inputs["attention_mask"].bool()
    inputs["ids"] = inputs.pop("input_ids")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = forward(model, DynamicCache(config=model.config), **inputs)[valid]
        cache = KVCache(model, LOSSLESS)
        mine = forward(model, cache, **inputs)[valid]
    assert cache.layers[0].cache.dtype == torch.bfloat16
    exact = forward(model, None, **inputs)[valid]
    assert (mine - exact).norm() < 2 * (theirs - exact).norm()
    # Its cache goes on without autocast: queries come in float32 then.
    assert forward(model, cache, torch.full((2, 1), 5)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = tiny("llama").to(dtype), prompt(padding=30)
    valid = inputs["attention_mask"].bool()
    inputs["ids"] = inputs.pop("input_ids")
    exact = forward(tiny("llama"), None, **inputs)[valid]
    theirs = forward(model, DynamicCache(config=model.config), **inputs)[valid]
    cache = KVCache(model, LOSSLESS)
    mine = forward(model, cache, **inputs)[valid]
    assert mine.dtype == dtype
    assert cache.packed_calls == [1, 1]
    assert (mine.float() - exact).norm() < 2 * (theirs.float() - exact).norm()


def test_backward_fails(llama: PreTrainedModel) -> None:
    """Packed attention has no gradient; a silently wrong one would be worse."""
    inputs = prompt(tokens=40)
    logits = llama(**inputs, past_key_values=KVCache(llama, LOSSLESS)).logits
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.sum().backward()


@pytest.mark.filterwarnings("ignore:.*needs dense keys")
@pytest.mark.parametrize("length", [None, 160])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_causal_chunk_has_no_mask_unless_one_is_needed(
    name: str, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks over a past, without padding: `[T, N]` exists only where keys are dense."""
    model, ids, made = tiny(name), prompt(tokens=150)["input_ids"], []

    def counted(**options: Any) -> Tensor | None:
        made.append(sdpa_mask(**options))
        return made[-1]

    monkeypatch.setattr(hf_attention, "sdpa_mask", counted)
    reference, cache = DynamicCache(), KVCache(model, LOSSLESS, max_length=length)
    parts = ids.split((70, 50, 29, 1), dim=1)
    model.set_attn_implementation("eager")
    expected = [forward(model, reference, part) for part in parts]
    model.set_attn_implementation(hf_attention.ATTENTION)
    for part, logits in zip(parts, expected, strict=True):
        close(forward(model, cache, part), logits)
    many = [mask for mask in made if mask is not None and mask.shape[2] > 1]
    assert bool(many) == (name != "llama") == any(cache.dense_calls)


def test_padding_is_in_the_mask_of_a_chunk(llama: PreTrainedModel) -> None:
    """A second turn after a padded one, with and without a word about the padding."""
    inputs, new = prompt(tokens=70, padding=20), prompt(tokens=30, seed=1)["input_ids"]
    reference, cache = DynamicCache(), KVCache(llama, LOSSLESS)
    llama.set_attn_implementation("sdpa")
    forward(llama, reference, **inputs_of(inputs))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    expected = forward(llama, reference, new, attention_mask=mask)
    llama.set_attn_implementation(hf_attention.ATTENTION)
    forward(llama, cache, **inputs_of(inputs))
    close(forward(llama, cache, new, attention_mask=mask), expected)


def inputs_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
