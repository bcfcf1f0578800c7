"""Handles of keys and values: what runs over the pages, and what needs them dense."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_thread import one_thread  # noqa: F401
from tiny_models import (
    LOSSLESS,
    NEW,
    SHAPE,
    TWO_BIT,
    VOCABULARY,
    WINDOW,
    close,
    forward,
    generate,
    prompt,
    state,
    tiny,
)
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    PreTrainedModel,
)

from kivi.hf import ATTENTION, KVCache


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


def new_states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, 2, tokens, 16, generator=generator)
    return k, v


def queries(tokens: int) -> Tensor:
    return torch.randn(2, 4, tokens, 16, generator=torch.Generator().manual_seed(9))


def filled(
    model: PreTrainedModel, tokens: int = 50, **options: Any
) -> tuple[KVCache, Tensor, Tensor]:
    """A cache whose first layer holds tokens, and these."""
    cache = KVCache(model, LOSSLESS, **options)
    k, v = new_states(tokens)
    F.scaled_dot_product_attention(
        queries(tokens), *cache.update(k, v, 0), is_causal=True, enable_gqa=True
    )
    assert cache.packed_calls[0] == 1
    return cache, k, v


@pytest.mark.parametrize("max_length", [None, 64])
def test_handle_metadata(llama: PreTrainedModel, max_length: int | None) -> None:
    cache, _, _ = filled(llama, max_length=max_length)
    before = state(cache)
    key, value = cache.update(*new_states(3, seed=1), 0)
    columns = max_length or 53
    for handle in (key, value):
        assert handle.shape == (2, 2, columns, 16)
        assert (handle.size(2), handle.size(), handle.dim(), handle.ndim) == (
            columns,
            handle.shape,
            4,
            4,
        )
        assert (len(handle), handle.numel()) == (2, 2 * 2 * columns * 16)
        assert (handle.dtype, handle.device) == (torch.float32, torch.device("cpu"))
        assert handle.is_floating_point() and not handle.requires_grad and not handle.is_cuda
        assert isinstance(hash(handle), int)
    assert cache.dense_calls[0] == 0
    torch.testing.assert_close(state(cache), before)  # nothing is stored before it is attended to


@pytest.mark.parametrize("mask", [False, True])
def test_sdpa_with_a_window(mask: bool) -> None:
    """Without a mask a query sees the window of the layer, which keeps no more."""
    model = tiny("mistral")
    cache, k, v = filled(model, tokens=60)
    new_k, new_v = new_states(1, seed=1)
    dense = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    attn_mask = (torch.arange(61) > 60 - WINDOW)[None, None, None] if mask else None
    options: dict[str, Any] = {"attn_mask": attn_mask, "enable_gqa": True}
    seen = [x[:, :, -WINDOW:] for x in dense]
    expected = F.scaled_dot_product_attention(queries(1), *seen, enable_gqa=True)
    mine = F.scaled_dot_product_attention(queries(1), *cache.update(new_k, new_v, 0), **options)
    close(mine, expected)
    assert (cache.packed_calls[0], cache.dense_calls[0]) == (2, 0)


def test_heads_of_one_device(llama: PreTrainedModel) -> None:
    """In tensor parallel a layer sees fewer heads than the model has."""
    cache = KVCache(llama, LOSSLESS)
    k, v, q = new_states(50)[0][:, :1], new_states(50)[1][:, :1], queries(50)[:, :2]
    mine = F.scaled_dot_product_attention(q, *cache.update(k, v, 0), is_causal=True)
    close(mine, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert cache.packed_calls[0] == 1


def test_handle_takes_no_memory(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, LOSSLESS)
    for handle in cache.update(*new_states(1000), 0):
        with torch._C.DisableTorchFunctionSubclass():
            assert handle.untyped_storage().nbytes() == 4
            assert handle.stride() == (0, 0, 0, 0)


OPERATIONS = {
    "matmul": lambda k, v: k @ v.transpose(-1, -2),
    "property": lambda k, v: k.mT,
    "slice": lambda k, v: v[:, :, 3:],
    "cat": lambda k, v: torch.cat([k, torch.ones_like(v)], 2),
    "keyword": lambda k, v: torch.mul(input=k, other=2),
    "in_place": lambda k, v: k.mul_(2) + k,
    "repeat": lambda k, v: k[:, :, None].expand(2, 2, 3, 53, 16).reshape(2, 6, 53, 16),
    "data": lambda k, v: v.data,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_on_handles(llama: PreTrainedModel, name: str) -> None:
    cache, k, v = filled(llama)
    new_k, new_v = new_states(3, seed=1)
    dense = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    with pytest.warns(UserWarning, match="needs dense keys and values"):
        mine = OPERATIONS[name](*cache.update(new_k, new_v, 0))
    assert type(mine) is Tensor
    torch.testing.assert_close(mine, OPERATIONS[name](*dense), rtol=0, atol=0)
    assert cache.layers[0].cache.lengths() == [53, 53]
    assert cache.dense_calls[0] == 1


def bool_mask(tokens: int, columns: int) -> Tensor:
    return torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens)[None, None]


# Calls of F.scaled_dot_product_attention with 3 queries over 50 + 3 columns.
SDPA_PACKED: dict[str, dict[str, Any]] = {
    "causal mask": {"attn_mask": bool_mask(3, 53)},
    "scale": {"attn_mask": bool_mask(3, 53), "scale": 0.1},
    "bidirectional": {"attn_mask": bool_mask(3, 53) | (torch.arange(53) >= 50)},
}
SDPA_DENSE: dict[str, dict[str, Any]] = {
    "sees all": {},
    "from the first column": {"is_causal": True},
    "bias": {"attn_mask": torch.linspace(-3, 3, 53).expand(2, 1, 3, 53)},
    "two dimensions": {"attn_mask": bool_mask(3, 53)[0, 0]},
    "by head": {
        "attn_mask": bool_mask(3, 53) & (torch.arange(4) < 2)[None, :, None, None]
        | (torch.arange(53) == 0)
    },
    "hides the past": {"attn_mask": bool_mask(3, 53) & (torch.arange(53) != 7)},
    "hides a new token": {
        "attn_mask": bool_mask(3, 53) & (torch.arange(53) != 51)
        | (torch.arange(3)[:, None] == 2) & (torch.arange(53) == 51)
    },
}


@pytest.mark.parametrize("name", [*SDPA_PACKED, *SDPA_DENSE])
def test_sdpa_on_handles(llama: PreTrainedModel, name: str) -> None:
    cache, k, v = filled(llama)
    new_k, new_v = new_states(3, seed=1)
    options = {**SDPA_PACKED, **SDPA_DENSE}[name]
    dense = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    expected = F.scaled_dot_product_attention(queries(3), *dense, enable_gqa=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key, value = cache.update(new_k, new_v, 0)
        mine = F.scaled_dot_product_attention(queries(3), key, value, enable_gqa=True, **options)
    close(mine, expected)
    assert (cache.packed_calls[0] == 2) == (name in SDPA_PACKED)
    assert cache.layers[0].cache.lengths() == [53, 53]
    torch.testing.assert_close(cache.layers[0].cache.dequantize(), dense, rtol=0, atol=0)


def test_sdpa_with_one_handle(llama: PreTrainedModel) -> None:
    """A model that changes keys or values after the cache gets what it asked for."""
    cache, k, v = filled(llama)
    new_k, new_v = new_states(3, seed=1)
    dense = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    expected = F.scaled_dot_product_attention(queries(3), dense[0], dense[1] * 2, enable_gqa=True)
    with pytest.warns(UserWarning):
        key, value = cache.update(new_k, new_v, 0)
        mine = F.scaled_dot_product_attention(queries(3), key, value * 2, enable_gqa=True)
    close(mine, expected)


def test_handles_are_not_kept(llama: PreTrainedModel) -> None:
    """Neither new keys nor masks outlive the forward that made them."""
    kept: list[weakref.ref[Tensor]] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kept.append(weakref.ref(kwargs["attention_mask"]))

    cache = KVCache(llama, TWO_BIT)
    update = cache.layers[0].update

    def update_watched(k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept.extend([weakref.ref(k), weakref.ref(v)])
        return update(k, v, *args, **kwargs)

    cache.layers[0].update = update_watched
    hook = llama.model.layers[0].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    forward(
        llama, cache, **{"ids" if k == "input_ids" else k: x for k, x in prompt(padding=9).items()}
    )
    hook.remove()
    gc.collect()
    assert len(kept) == 3
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("max_length", [None, 128])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_dense_fallback(name: str, max_length: int | None) -> None:
    """A model whose attention multiplies keys itself, with left padding; one warning."""
    model, inputs = tiny(name), prompt(padding=30)
    cache = KVCache(model, LOSSLESS, max_length=max_length)
    model.set_attn_implementation("eager")
    theirs = generate(model, DynamicCache(config=model.config), inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = generate(model, cache, inputs)
    assert torch.equal(mine, theirs)
    assert cache.dense_calls == [NEW, NEW]
    assert cache.packed_calls == [0, 0]
    assert sum("needs dense keys" in str(w.message) for w in caught) == 1


@pytest.mark.filterwarnings("ignore:.*needs dense keys")
@pytest.mark.parametrize("dense", [(2, 4), (0, 1, 3)], ids=["packed first", "dense first"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_dense_and_packed_by_turns(name: str, dense: tuple[int, ...]) -> None:
    """Padding is where the masks say, whether packed attention or the dense fallback came first."""
    model, inputs = tiny(name), prompt(tokens=110)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[0, :30] = 0
    mask[0, 80:85] = 0  # in the middle, as in the second turn of a ragged batch
    position = (mask.cumsum(1) - 1).clamp_min(0)
    reference, cache = DynamicCache(config=model.config), KVCache(model, LOSSLESS)
    chunks = ((0, 70), (70, 90), (90, 91), (91, 108), (108, 109), (109, 110))
    for i, (start, end) in enumerate(chunks):
        new = slice(start, end)
        inputs = {"attention_mask": mask[:, :end], "position_ids": position[:, new]}
        model.set_attn_implementation("sdpa")
        theirs = forward(model, reference, ids[:, new], **inputs)
        model.set_attn_implementation("eager" if i in dense else ATTENTION)
        mine = forward(model, cache, ids[:, new], **inputs)
        valid = mask[:, new].bool()
        close(mine[valid], theirs[valid])
    if name == "llama" and 0 not in dense:
        assert (cache.packed_calls[0], cache.dense_calls[0]) == (4, 2)
    assert cache.packed_calls[0] + cache.dense_calls[0] == len(chunks)


@pytest.mark.filterwarnings("ignore:.*needs dense keys")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padded_second_turn(name: str) -> None:
    """Padding between the turns: a window of transformers counts it, so its layers go dense."""
    model, inputs = tiny(name), prompt(padding=30)
    reference, cache = DynamicCache(config=model.config), KVCache(model, LOSSLESS)
    said = generate(model, reference, inputs)
    assert torch.equal(generate(model, cache, inputs), said)
    second = prompt(tokens=20, padding=12, seed=1)
    mask = torch.ones_like(said)
    mask[:, :70] = inputs["attention_mask"]
    inputs = {
        "input_ids": torch.cat([said, second["input_ids"]], 1),
        "attention_mask": torch.cat([mask, second["attention_mask"]], 1),
    }
    assert torch.equal(generate(model, cache, inputs), generate(model, reference, inputs))
    assert cache.dense_calls[0] == 0 if name == "llama" else cache.dense_calls[0] > 0


def test_alibi() -> None:
    """Falcon with ALiBi adds numbers to its scores: dense, and equal."""
    model, inputs = tiny("falcon_alibi"), prompt(padding=30)
    theirs = generate(model, DynamicCache(config=model.config), inputs)
    cache = KVCache(model, LOSSLESS)
    with pytest.warns(UserWarning, match="scaled_dot_product_attention needs dense"):
        assert torch.equal(generate(model, cache, inputs), theirs)
    assert cache.dense_calls == [NEW, NEW]


def test_shared_keys() -> None:
    """Layers that attend to the keys of another layer see the new ones exactly."""
    config = Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 4},
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=48,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    inputs = prompt(padding=30)
    valid = inputs["attention_mask"].bool()
    ids = {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = forward(model, DynamicCache(config=config), **ids)[valid]
    with pytest.warns(UserWarning, match="shared keys|needs dense"):
        mine = forward(model, KVCache(model, TWO_BIT), **ids)[valid]
    close(mine, expected)  # exact although everything is in two bits
    theirs = generate(model, DynamicCache(config=config), inputs)
    cache = KVCache(model, LOSSLESS)
    with pytest.warns(UserWarning):
        assert torch.equal(generate(model, cache, inputs), theirs)
    assert cache.packed_calls == cache.dense_calls == [NEW, NEW]
