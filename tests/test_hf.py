"""KVCache beyond plain generation: handles, masks, rows, schemes, memory, compiled steps."""

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SHAPE, VOCABULARY, WINDOW, prompt, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kivi import KVQuantizer
from kivi.hf import ATTENTION, KVCache

LOSSLESS = KVQuantizer.get("full_precision", residual_length=0, sink_length=2)
TWO_BIT = KVQuantizer.get("kivi", bits=2, residual_length=16)
NEW = 24


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Cache | None, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


def generate(
    model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], **options: Any
) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def state(cache: KVCache) -> list[Any]:
    """All that a cache holds."""
    held: list[Any] = [int(cache.get_seq_length())]
    for layer in (layer for layer in cache.packed_layers if layer.is_initialized):
        held += [layer.cache.lengths(), layer.cache.packed_lengths(), *layer.cache.dequantize()]
    return held


# -------------------------------------------------------------------------- handles


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
    """Without a mask a single query sees all, whatever the window of the layer."""
    model = tiny("mistral")
    cache, k, v = filled(model, tokens=60)
    new_k, new_v = new_states(1, seed=1)
    dense = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    attn_mask = (torch.arange(61) > 60 - WINDOW)[None, None, None] if mask else None
    options: dict[str, Any] = {"attn_mask": attn_mask, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(queries(1), *dense, **options)
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

    def update_watched(k: Tensor, v: Tensor, *args: Any) -> Any:
        kept.extend([weakref.ref(k), weakref.ref(v)])
        return update(k, v, *args)

    cache.layers[0].update = update_watched
    hook = llama.model.layers[0].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    forward(
        llama, cache, **{"ids" if k == "input_ids" else k: x for k, x in prompt(padding=9).items()}
    )
    hook.remove()
    gc.collect()
    assert len(kept) == 3
    assert all(ref() is None for ref in kept)


# -------------------------------------------------------------------------- dense fallback


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


# -------------------------------------------------------------------------- masks


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


def test_mask_written_in_place(llama: PreTrainedModel) -> None:
    """One buffer for the masks of all steps, as in static loops."""
    model, ids = tiny("llama"), prompt(tokens=60)["input_ids"]
    expected = forward(model, None, ids)
    cache = KVCache(model, LOSSLESS, max_length=64)
    buffer = torch.zeros(2, 1, 1, 64, dtype=torch.bool)
    with torch.inference_mode():
        frozen = buffer.clone()
    for i in range(60):
        buffer[..., : i + 1] = True
        with torch.inference_mode():
            frozen.copy_(buffer)
        mask = buffer if i % 2 else frozen
        mine = forward(model, cache, ids[:, i : i + 1], attention_mask=mask)
        close(mine[:, 0], expected[:, i])
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


# -------------------------------------------------------------------------- dtypes, gradients


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


# -------------------------------------------------------------------------- rows


@pytest.mark.parametrize("padding", [0, 30])
def test_beam_search(llama: PreTrainedModel, padding: int) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    inputs = prompt(padding=padding)
    theirs = generate(llama, DynamicCache(config=llama.config), inputs, **options)
    cache = KVCache(llama, KVQuantizer.get("full_precision", residual_length=16))
    assert torch.equal(generate(llama, cache, inputs, **options), theirs)
    assert cache.dense_calls == [0, 0]
    assert theirs.shape[0] == 4


def test_beam_search_static(llama: PreTrainedModel) -> None:
    inputs = prompt()
    theirs = generate(llama, DynamicCache(config=llama.config), inputs, num_beams=3)
    cache = KVCache(llama, LOSSLESS, max_length=128)
    assert torch.equal(generate(llama, cache, inputs, num_beams=3), theirs)


def test_several_sequences(llama: PreTrainedModel) -> None:
    options = {"num_return_sequences": 3, "do_sample": True, "return_dict_in_generate": True}
    results = []
    for cache in (DynamicCache(config=llama.config), KVCache(llama, LOSSLESS)):
        torch.manual_seed(5)
        results.append(generate(llama, cache, prompt(padding=30), **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert results[1].past_key_values is cache
    assert len(results[1].sequences.unique(dim=0)) == 6


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompt_lookup(name: str) -> None:
    model = tiny(name)
    pattern = prompt(1, tokens=12)["input_ids"]
    inputs = {"input_ids": pattern.repeat(1, 6), "attention_mask": torch.ones(1, 72).long()}
    plain = generate(model, DynamicCache(config=model.config), inputs)
    cache = KVCache(model, LOSSLESS)
    assert torch.equal(generate(model, cache, inputs, prompt_lookup_num_tokens=4), plain)
    assert cache.dense_calls == [0, 0]


def test_assisted_decoding(llama: PreTrainedModel) -> None:
    inputs = prompt(1)
    plain = generate(llama, DynamicCache(config=llama.config), inputs)
    cache = KVCache(llama, LOSSLESS)
    helper = tiny("llama", num_hidden_layers=1)
    assert torch.equal(generate(llama, cache, inputs, assistant_model=helper), plain)
    assert cache.dense_calls == [0, 0]


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
    torch.testing.assert_close(state(cache), before)


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


# -------------------------------------------------------------------------- schemes, errors


def test_schemes_of_layers() -> None:
    model = tiny("llama", num_hidden_layers=4)
    four, two, exact = (
        KVQuantizer.get(name, residual_length=16, **options)
        for name, options in (("kivi", {"bits": 4}), ("kivi", {"bits": 2}), ("full_precision", {}))
    )
    assert KVCache(model, [exact, four, two, "int8"]).schemes == [
        exact,
        four,
        two,
        KVQuantizer.get("int8"),
    ]
    cache = KVCache(model, {"default": two, 0: exact, -1: "per_token"})
    assert cache.schemes == [exact, two, two, KVQuantizer.get("per_token")]
    assert KVCache(model, dict(enumerate([exact, four, two, two]))).schemes[1] == four
    inputs = prompt()
    assert generate(model, cache, inputs).shape == (2, 70 + NEW)
    sizes = [layer.cache.nbytes().used for layer in cache.packed_layers]
    assert sizes[0] > 1.2 * sizes[1]
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("kiwi", {}, "did you mean 'kivi'"),
        ("kivi", {"bit": 2}, "did you mean 'bits'"),
        ("kivi", {"bits": 5}, "bits=5"),
        (TWO_BIT, {"bits": 4}, r"\['bits'\] need a scheme's name"),
        ([TWO_BIT], {}, "1 entries; the model has 2 layers"),
        ({0: TWO_BIT}, {}, "unless every layer is named"),
        ({"default": TWO_BIT, 2: TWO_BIT}, {}, "allowed are -2 to 1"),
        ({"default": TWO_BIT, -3: TWO_BIT}, {}, "allowed are -2 to 1"),
        ({"default": TWO_BIT, "last": TWO_BIT}, {}, "'last'|last"),
        ([TWO_BIT, 4], {}, "scheme=4 is not allowed"),
        ("kivi", {"max_length": 0}, "max_length=0"),
        ("kivi", {"max_length": 2.5}, "max_length=2.5"),
        ("kivi", {"impl": "cuda"}, "impl='cuda'"),
    ],
)
def test_wrong_schemes(scheme: Any, options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        KVCache(model, scheme, **options)
    assert model.config._attn_implementation != ATTENTION  # nothing was changed


def test_encoder_decoder_is_refused() -> None:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, **shape))
    with pytest.raises(ValueError, match="model=T5ForConditionalGeneration"):
        KVCache(model, "kivi")


def test_layers_of_other_kinds() -> None:
    """Llama 4 attends within chunks in some layers; these keep transformers' own cache."""
    config = Llama4TextConfig(
        **{**SHAPE, "num_hidden_layers": 4},
        attention_chunk_size=48,
        num_local_experts=2,
        intermediate_size_mlp=96,
    )
    torch.manual_seed(0)
    model, inputs = Llama4ForCausalLM(config).eval(), prompt(padding=30)
    theirs = generate(model, DynamicCache(config=config), inputs)
    with pytest.warns(UserWarning, match="DynamicSlidingWindowLayer"):
        cache = KVCache(model, LOSSLESS)
    assert len(cache.packed_layers) == 1
    assert torch.equal(generate(model, cache, inputs), theirs)
    assert (cache.packed_calls, cache.dense_calls) == ([NEW], [0])
    with pytest.warns(UserWarning):
        static = KVCache(model, LOSSLESS, max_length=99)
    assert [type(a).__name__ for a in static.layers[:3]] == ["StaticSlidingWindowLayer"] * 3
    # Before its chunk is full such a layer holds all tokens, and they can be handed on.
    ids = inputs["input_ids"][:, 30:70]
    exact = DynamicCache(config=config)
    forward(model, exact, ids)
    with pytest.warns(UserWarning):
        loaded = KVCache(model, LOSSLESS)
    loaded.prefill_from(exact)
    close(forward(model, loaded, ids[:, :3]), forward(model, exact, ids[:, :3]))


@pytest.mark.parametrize("padding", [0, 30])
def test_over_max_length(llama: PreTrainedModel, padding: int) -> None:
    inputs = prompt(padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = KVCache(llama, TWO_BIT, max_length=75)
    forward(llama, cache, ids, attention_mask=mask)
    before = state(cache)
    more = torch.full((2, 6), 5)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with pytest.raises(ValueError, match="max_length=75"):
        forward(llama, cache, more, attention_mask=longer)
    torch.testing.assert_close(state(cache), before)
    untouched = KVCache(llama, TWO_BIT, max_length=75)
    forward(llama, untouched, ids, attention_mask=mask)
    last = {"ids": more[:, :5], "attention_mask": longer[:, :75]}
    close(forward(llama, cache, **last), forward(llama, untouched, **last))


def test_prompt_over_max_length(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, TWO_BIT, max_length=60)
    with pytest.raises(ValueError, match="max_length=60"):
        forward(llama, cache, prompt()["input_ids"])
    assert (cache.get_seq_length(), cache.get_max_length()) == (0, 60)
    assert KVCache(llama, TWO_BIT).get_max_length() == -1


def test_check_finite(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, "kivi", check_finite=True, max_length=128)
    assert not cache.is_compileable and KVCache(llama, "kivi", max_length=128).is_compileable
    generate(llama, cache, prompt(padding=30))
    before = state(cache)
    k, v = new_states(3)
    v[0, 0, 1, 2] = float("nan")
    key, value = cache.update(k, v, 0)
    with pytest.raises(ValueError, match="v has 1 NaN"):
        F.scaled_dot_product_attention(queries(3), key, value, attn_mask=bool_mask(3, 128) * True)
    torch.testing.assert_close(state(cache), before)


@pytest.mark.parametrize("scheme", [LOSSLESS, TWO_BIT])
def test_prefill_from(llama: PreTrainedModel, scheme: KVQuantizer) -> None:
    inputs = prompt()
    exact = DynamicCache(config=llama.config)
    forward(llama, exact, inputs["input_ids"])
    loaded, fed = KVCache(llama, scheme), KVCache(llama, scheme, max_length=128)
    loaded.prefill_from(exact)
    forward(llama, fed, inputs["input_ids"])
    torch.testing.assert_close(state(loaded), state(fed), rtol=1e-5, atol=1e-5)
    ids = torch.full((2, 1), 7)
    close(forward(llama, loaded, ids), forward(llama, fed, ids))
    assert exact.get_seq_length() == 70
    with pytest.raises(ValueError, match="empty cache"):
        loaded.prefill_from(exact)
    loaded.reset()
    loaded.prefill_from(exact)
    assert loaded.get_seq_length() == 70


def test_wrong_prefill_from(llama: PreTrainedModel) -> None:
    cache = KVCache(llama, TWO_BIT)
    with pytest.raises(ValueError, match="2 layers"):
        cache.prefill_from(DynamicCache())
    with pytest.raises(ValueError, match="2 layers that hold all of 0 tokens"):
        cache.prefill_from(DynamicCache(config=llama.config))
    mistral = tiny("mistral")
    sliding = DynamicCache(config=mistral.config)
    forward(mistral, sliding, prompt()["input_ids"])
    with pytest.raises(ValueError, match="hold all of 70 tokens"):
        KVCache(mistral, TWO_BIT).prefill_from(sliding)


# -------------------------------------------------------------------------- memory


def test_bytes(llama: PreTrainedModel) -> None:
    model = tiny("llama", head_dim=32, max_position_embeddings=4096).to(torch.bfloat16)
    ids = prompt(1, tokens=2304)["input_ids"]
    exact = DynamicCache(config=model.config)
    forward(model, exact, ids, logits_to_keep=1)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in exact.layers)
    cache = KVCache(model, "kivi", bits=2, residual_length=32)
    assert cache.nbytes() == (0, 0)
    forward(model, cache, ids, logits_to_keep=1)
    size = cache.nbytes()
    assert size.used < 0.25 * full
    assert size.used <= size.allocated < 0.4 * full


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("max_length", [None, 1100])
def test_prefill_quantizes_layer_by_layer(max_length: int | None) -> None:
    """Beside what is packed, full-precision keys and values of one layer at most are alive."""
    model = tiny("llama", num_hidden_layers=5, head_dim=32, max_position_embeddings=2048)
    ids = prompt(1, tokens=1024)["input_ids"]
    layer_bytes = 2 * 2 * 1024 * 32 * 4
    cache, excess = KVCache(model, "kivi", bits=2, residual_length=32, max_length=max_length), []

    def measure(*_: Any) -> None:
        excess.append(live_bytes() - cache.nbytes().allocated)

    hooks = [layer.register_forward_hook(measure) for layer in model.model.layers]
    forward(model, cache, ids, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    assert len(excess) == 5
    assert max(excess[1:]) - excess[1] < layer_bytes / 20
    assert min(layer.cache.packed_lengths()[0] for layer in cache.packed_layers) > 900


# -------------------------------------------------------------------------- compile


@pytest.mark.compile
def test_compiled_step() -> None:
    """A decode step of a whole model is one graph, for every step and every cache."""
    model, inputs = tiny("llama", num_hidden_layers=1), prompt(tokens=20, padding=7)
    ids = prompt(tokens=60, seed=1)["input_ids"]
    mask = torch.ones(2, 128, dtype=torch.int64)
    mask[:, :20] = inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).clamp_min(0)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def play(run: Any, scheme: KVQuantizer, steps: int) -> tuple[Tensor, KVCache]:
        cache = KVCache(model, scheme, max_length=128)
        forward(
            model,
            cache,
            inputs["input_ids"],
            attention_mask=mask[:, :20],
            position_ids=position[:, :20],
        )
        logits = [
            forward(
                run,
                cache,
                ids[:, i : i + 1],
                attention_mask=mask,
                position_ids=position[:, 20 + i : 21 + i],
            )
            for i in range(steps)
        ]
        return torch.cat(logits, 1), cache

    scheme = KVQuantizer.get("kivi", bits=2, residual_length=0, sink_length=1)
    eager, cache = play(model, scheme, 48)
    mine, static = play(compiled, scheme, 48)
    torch.testing.assert_close(mine, eager, rtol=1e-3, atol=1e-3)
    assert static.packed_layers[0].cache.packed_lengths() == [32, 64]
    assert cache.packed_layers[0].cache.packed_lengths() == [32, 64]
    again, _ = play(compiled, scheme, 4)
    torch.testing.assert_close(again, mine[:, :4], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    # Eager steps go on from compiled ones.
    close(
        forward(model, static, ids[:, 48:50], attention_mask=mask, position_ids=position[:, 68:70]),
        forward(model, cache, ids[:, 48:50], attention_mask=mask, position_ids=position[:, 68:70]),
    )


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mistral", "falcon"])
def test_compiled_generate(name: str) -> None:
    """What `generate` does by itself on CUDA, traced without a compiler behind it."""
    model, inputs = tiny(name), prompt(padding=30)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    theirs = generate(model, DynamicCache(config=model.config), inputs)
    for _ in range(2):
        cache = KVCache(model, LOSSLESS, max_length=128)
        mine = generate(model, cache, inputs, compile_config=config)
        assert torch.equal(mine, theirs)
        assert cache.packed_calls[0] < 5  # the other steps ran in a graph
