"""KVCache: schemes of layers, what is refused, memory."""

import gc
from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, NEW, SHAPE, TWO_BIT, close, forward, generate, prompt, state, tiny
from torch import Tensor
from transformers import (
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kivi import KVQuantizer
from kivi.hf import ATTENTION, KVCache


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny("llama")


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
    ends = {"default": KVQuantizer.get("kivi", key_bits=4, value_bits=2), 0: exact, -1: exact}
    specs = [scheme.spec(i) for i, scheme in enumerate(KVCache(model, ends).schemes)]
    assert [(s.key.bits, s.value.bits) if s.key else None for s in specs] == [
        None,
        (4, 2),
        (4, 2),
        None,
    ]
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


def test_check_finite() -> None:
    model = tiny("llama")
    model.model.embed_tokens.weight.data[9] = float("nan")
    cache = KVCache(model, "kivi", check_finite=True, max_length=128)
    assert KVCache(model, "kivi", max_length=128).is_compileable
    assert not cache.is_compileable  # checking reads the device
    ids = prompt()["input_ids"]
    forward(model, cache, ids.masked_fill(ids == 9, 8))
    before = state(cache)
    with pytest.raises(ValueError, match="k has 32 NaN"):
        forward(model, cache, torch.tensor([[8], [9]]))
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
