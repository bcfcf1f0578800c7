"""Keys as they were before a model's rotary embedding: found, undone, and done again."""

import inspect
import sys

import pytest
import torch
from tiny_models import MODELS, SHAPE
from transformers import CohereConfig, CohereForCausalLM, DynamicCache, GlmConfig, GlmForCausalLM

from kivi import KVQuantizer
from kivi.hf import KVCache
from kivi.hf_rope import find_rope
from kivi.quantize import dequantize, quantize
from kivi.spec import OpaqueSpec
from kivi.transforms import turn

WITHOUT_DIM = {k: v for k, v in SHAPE.items() if k != "head_dim"}
ROTARY = {
    **{name: MODELS[name] for name in ("llama", "llama3", "qwen3", "gemma3", "falcon")},
    "cohere": (CohereConfig, CohereForCausalLM, WITHOUT_DIM),  # neighbours are pairs
    "glm": (GlmConfig, GlmForCausalLM, SHAPE),  # neighbours are pairs, of half of the channels
}
PRE_ROPE = [
    name
    for name in KVQuantizer.available()
    if isinstance(key := KVQuantizer.get(name).spec().key, OpaqueSpec) and key.pre_rope
]


def made(name):
    config, model, options = ROTARY[name]
    torch.manual_seed(0)
    return model(config(**options)).eval()


@pytest.mark.parametrize("name", ROTARY)
def test_a_rope_is_what_the_model_does(name):
    model, position = made(name), torch.tensor([[0, 3, 150]])
    decoder = model.get_decoder()
    layer = {}
    if "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters:
        layer = {"layer_type": model.config.layer_types[1]}
    cos, sin = decoder.rotary_emb(torch.zeros(1, 3, 1), position, **layer)
    rope = find_rope(model, 1)
    k = torch.randn(1, 2, 3, len(rope.frequency))
    apply = sys.modules[type(decoder).__module__].apply_rotary_pos_emb
    turned = turn(k, position[:, None], rope)
    torch.testing.assert_close(turned, apply(k, k, cos, sin)[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(turn(turned, position[:, None], rope, back=True), k)
    wide = torch.cat([k, k], -1)  # channels past its end stay
    assert torch.equal(turn(wide, position[:, None], rope)[..., k.shape[-1] :], k)


def test_models_without_a_rope_have_none():
    for name in ("falcon_alibi", "deepseek_v3"):
        config, model, options = MODELS[name]
        assert find_rope(model(config(**options)), 0) is None
    scheme = KVQuantizer.get("kivi")
    assert scheme.spec().with_rope(find_rope(made("llama"), 0)) == scheme.spec()


@pytest.mark.parametrize("scheme", PRE_ROPE)
def test_a_cache_quantizes_keys_as_they_were_before(scheme):
    """Also where padding, which is not stored, moves a row."""
    model = made("llama")
    chosen = KVQuantizer.get(scheme, sink_length=3, residual_length=0)
    ids, mask = torch.randint(2, 90, (2, 170)), torch.ones(2, 170, dtype=torch.int64)
    mask[1, :30] = 0
    place = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=place)
    cache, exact = KVCache(model, chosen), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model(**inputs, past_key_values=exact)
    rope, layer = find_rope(model, 0), cache.layers[0].cache
    assert layer.spec.key.rope == rope
    for row, padding in enumerate((0, 30)):
        keys = exact.layers[0].keys[row : row + 1, :, padding:]
        end = 3 + layer.packed_lengths()[row]
        position = torch.arange(3, end)
        before = turn(keys[:, :, 3:end], position, rope, back=True)
        expected = turn(dequantize(quantize(before, chosen.spec().key)), position, rope)
        found = layer.dequantize()[0][row : row + 1, :, 3:end]
        assert end > 3 + 96
        # A code next to a rounding edge may be the other one.
        far = (found - expected).abs() > 1e-3 * expected.abs().max()
        assert far.float().mean() < 0.01
        other = dequantize(quantize(keys[:, :, 3:end], chosen.spec().key))
        assert (found - other).norm() > 10 * (found - expected).norm()


@pytest.mark.parametrize("scheme", PRE_ROPE)
def test_splits_and_compiled_steps_do_not_matter(scheme):
    chosen = KVQuantizer.get(scheme, sink_length=2, residual_length=0)
    rope = find_rope(made("llama"), 0)
    sizes = dict(batch_size=1, num_kv_heads=2, head_dim=16, dtype=torch.float32, rope=rope)
    torch.manual_seed(1)
    k, v = torch.randn(2, 1, 2, 700, 16)
    whole, parts = (chosen.new_layer(**sizes, max_length=800) for _ in range(2))
    whole.prefill(k, v)
    for start in (0, 350, 600):
        end = {0: 350, 350: 600, 600: 700}[start]
        parts.append(k[:, :, start:end], v[:, :, start:end])
    for a, b in zip(whole.dequantize(), parts.dequantize(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert whole._pages.pool.pages()[0].words.shape[-1] == whole.spec.key.unit_nbytes(16)
    torch._dynamo.reset()
    step = torch.compile(lambda *qkv: parts.decode(*qkv), backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(40):
            torch.manual_seed(seed)
            qkv = torch.randn(3, 1, 2, 1, 16)
            torch.testing.assert_close(step(*qkv), whole.decode(*qkv), rtol=1e-4, atol=1e-4)
