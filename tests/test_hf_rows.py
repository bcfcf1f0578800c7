"""Crops, selections and copies of a KVCache."""

import copy

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import (
    LOSSLESS,
    NEW,
    TWO_BIT,
    close,
    forward,
    generate,
    prompt,
    state,
    tiny,
)
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
)

from kivi import KVQuantizer
from kivi.hf import KVCache


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.mark.parametrize("max_length", [None, 128])
def test_crop(llama: PreTrainedModel, max_length: int | None) -> None:
    ids = prompt(tokens=80)["input_ids"]
    expected = forward(llama, None, ids)
    cache = KVCache(llama, LOSSLESS, max_length=max_length)
    forward(llama, cache, ids[:, :70])
    cache.crop(0)
    for removed in (1, 40):  # the second cut falls into packed pages
        cache.crop(-removed)
        kept = int(cache.get_seq_length())
        mine = forward(llama, cache, ids[:, kept:])
        close(mine, expected[:, kept:])
    before = state(cache)
    with pytest.raises(ValueError, match="tokens_to_remove=3"):
        cache.crop(3)
    with pytest.raises(ValueError, match="tokens=81"):
        cache.crop(-81)
    with pytest.raises(ValueError, match="input of 3 rows is not allowed; this cache has 2"):
        forward(llama, cache, ids[[0, 1, 0], :5])
    torch.testing.assert_close(state(cache), before)


@pytest.mark.parametrize("max_length", [None, 128])
def test_a_copy_goes_on_after_inference_mode(
    llama: PreTrainedModel, max_length: int | None
) -> None:
    cache, inputs = KVCache(llama, LOSSLESS, max_length=max_length), prompt(padding=30)
    with torch.inference_mode():
        generate(llama, cache, inputs, max_new_tokens=5)
        copied = copy.deepcopy(cache)
        copied.crop(-3)
    ids = prompt(tokens=3, seed=1)["input_ids"]
    mask = torch.ones(2, int(cache.get_seq_length()), dtype=torch.int64)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    cache.crop(-3)
    mine, theirs = (forward(llama, x, ids, attention_mask=mask) for x in (copied, cache))
    assert torch.equal(mine, theirs)


def test_crop_of_padding(llama: PreTrainedModel) -> None:
    inputs, ids = prompt(padding=30), prompt(tokens=20, seed=1)["input_ids"]
    cache = KVCache(llama, LOSSLESS)
    generate(llama, cache, inputs, max_new_tokens=5)
    copied = copy.deepcopy(cache)
    cache.crop(-30)  # only what comes after the padding
    with pytest.raises(ValueError, match="padding"):
        cache.crop(-16)
    mask = torch.cat([inputs["attention_mask"][:, :44], torch.ones_like(ids)], 1)
    alone = forward(
        llama,
        None,
        torch.cat([inputs["input_ids"][:, :44], ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
    )
    mine = forward(
        llama, cache, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, 44:]
    )
    close(mine, alone[:, 44:])
    assert copied.get_seq_length() == 74


@pytest.mark.parametrize("max_length", [None, 128])
def test_select_and_repeat(llama: PreTrainedModel, max_length: int | None) -> None:
    inputs, ids = prompt(3, padding=30), prompt(6, tokens=2, seed=1)["input_ids"]
    mask = inputs["attention_mask"]

    def play(cache: Cache) -> list[Tensor]:
        model = llama
        forward(model, cache, inputs["input_ids"], attention_mask=mask)
        said, rows = [], mask

        def step() -> None:
            nonlocal rows
            rows = torch.cat([rows, rows.new_ones(len(rows), 2)], 1)
            said.append(forward(model, cache, ids[: len(rows)], attention_mask=rows))

        cache.reorder_cache(torch.tensor([2, 0, 0]))
        rows = rows[[2, 0, 0]]
        step()
        cache.batch_select_indices(torch.tensor([True, False, True]))
        rows = rows[[0, 2]]
        step()
        cache.batch_repeat_interleave(3)
        rows = rows.repeat_interleave(3, 0)
        step()
        cache.batch_select_indices(torch.tensor([4, 1]))
        rows = rows[[4, 1]]
        step()
        return said

    mine = play(KVCache(llama, LOSSLESS, max_length=max_length))
    for a, b in zip(mine, play(DynamicCache(config=llama.config)), strict=True):
        close(a, b)


@pytest.mark.parametrize("max_length", [None, 128])
@pytest.mark.parametrize("scheme", [LOSSLESS, TWO_BIT])
def test_reset_and_copy(
    llama: PreTrainedModel, scheme: KVQuantizer, max_length: int | None
) -> None:
    inputs = prompt(padding=30)
    cache = KVCache(llama, scheme, max_length=max_length)
    cache.reset()  # of an empty cache
    said = generate(llama, cache, inputs)
    held = state(cache)
    other = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(state(other), held)
    assert torch.equal(generate(llama, cache, inputs), said)
    torch.testing.assert_close(state(cache), held)
    ids = torch.full((2, 1), 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.int64)], 1)
    close(
        forward(llama, other, ids, attention_mask=mask),
        forward(llama, cache, ids, attention_mask=mask),
    )


@pytest.mark.parametrize("max_length", [None, 128])
def test_outlives_inference_mode(llama: PreTrainedModel, max_length: int | None) -> None:
    """Tensors made in inference mode cannot be written outside of it; a cache can."""
    ids = prompt(tokens=90)["input_ids"]
    expected = forward(llama, None, ids)
    cache = KVCache(llama, LOSSLESS, max_length=max_length)
    with torch.inference_mode():
        llama(ids[:, :40], past_key_values=cache)
    close(forward(llama, cache, ids[:, 40:80]), expected[:, 40:80])
    with torch.inference_mode():
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([1, 0]))
    close(forward(llama, cache, ids[[1, 0], 50:]), expected[[1, 0], 50:])
