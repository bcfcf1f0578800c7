"""The attention of a few queries, by which formats may choose bits for tokens."""

import math

import pytest
import torch
from tiny_models import MODELS

from kivi import KVQuantizer, saliency
from kivi.evals.feeding import exact_prefix, start_cache
from kivi.hf import KVCache

WEIGHING = [n for n in KVQuantizer.available() if KVQuantizer.get(n).spec().weighs_tokens]


def test_there_are_schemes_that_weigh():
    assert WEIGHING and not KVQuantizer.get("kivi").spec().weighs_tokens


@pytest.mark.parametrize("block", [1, 2**28])
def test_saliency_is_normalized_attention(block, monkeypatch):
    monkeypatch.setattr(saliency, "BLOCK_SCORES", block)
    torch.manual_seed(0)
    probes, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 12, 16)
    place = torch.tensor([[3, -1, 9, 20, 14], [0, 13, 6, -1, -1]])
    first = torch.tensor([2, 5])
    found = saliency.saliency(probes, place, k, first)
    for b in range(2):
        seen = torch.arange(12)[None] + first[b] <= place[b][:, None]
        for h in range(2):
            total = torch.zeros(12)
            for probe, own in ((p, own) for p, own in enumerate(seen) if own.any()):
                for q in (2 * h, 2 * h + 1):
                    weight = (k[b, h][own] @ probes[b, q, probe]).softmax(0)
                    total[own] += weight
            torch.testing.assert_close(found[b, h, :, 0], total / seen.sum(0).clamp_min(1))


def test_probes_are_recent_and_spread_queries():
    index = saliency.probe_index(100, torch.device("cpu"))
    assert index.tolist() == [0, 19, 38, 57, 76, 95, 96, 97, 98, 99]
    assert saliency.probe_index(1, torch.device("cpu")).tolist() == [0]
    one = saliency.saliency(torch.ones(1, 1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1, 4, 1), 0)
    assert one.flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("name", WEIGHING)
def test_tokens_that_get_attention_lose_less(name):
    """One in eight keys is what all queries look for, wherever pages and steps begin."""
    scheme = KVQuantizer.get(name)
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 1, 1300, 32)
    q = torch.ones(1, 1, 1300, 32) * 0.2
    wanted = torch.arange(1300) % 8 == 0
    k[:, :, wanted] += 0.5
    for chunks in ([1300], [700, 20, 580]):
        sizes = dict(batch_size=1, num_kv_heads=1, head_dim=32, dtype=torch.float32)
        layer, start = scheme.new_layer(**sizes), 0
        for t in chunks:
            part = slice(start, start + t)
            layer.decode(q[:, :, part], k[:, :, part], v[:, :, part])
            start += t
        end = layer.packed_lengths()[0]
        error = (layer.dequantize()[1][0, 0, :end] - v[0, 0, :end]).norm(dim=-1)
        chosen = error[wanted[:end]].mean(), error[~wanted[:end]].mean()
        assert chosen[0] < 0.8 * chosen[1]


@pytest.mark.parametrize("name", WEIGHING)
def test_a_nan_stays_where_it_is(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 400, 32)
    layers = []
    for value in (1.0, math.nan):
        k, v = k.clone(), v.clone()
        k[1, 1, 200, 3] = value
        layers.append(
            KVQuantizer.get(name).new_layer(
                batch_size=2, num_kv_heads=2, head_dim=32, dtype=torch.float32
            )
        )
        layers[-1].decode(q, k, v)
    for a, b in zip(*(layer.dequantize() for layer in layers), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, 0], b[1, 0])
        assert b[:, :, :384].isfinite().all()


@pytest.mark.compile
@pytest.mark.parametrize("name", WEIGHING)
def test_compiled_steps_weigh_alike(name):
    torch._dynamo.reset()
    sizes = dict(batch_size=1, num_kv_heads=1, head_dim=32, dtype=torch.float32, max_length=170)
    eager, traced = (KVQuantizer.get(name).new_layer(**sizes) for _ in range(2))
    step = torch.compile(lambda *qkv: traced.decode(*qkv), backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    prompt = torch.randn(3, 1, 1, 100, 32)
    with torch.no_grad():
        for layer in (eager, traced):
            layer.decode(*prompt)
        for _ in range(40):
            qkv = torch.randn(3, 1, 1, 1, 32)
            torch.testing.assert_close(step(*qkv), eager.decode(*qkv))
    assert eager.packed_lengths() == [128]


@pytest.mark.parametrize("name", WEIGHING)
def test_evaluations_show_it_the_prompts_queries(name):
    config, model, options = MODELS["llama"]
    torch.manual_seed(0)
    model = model(config(**options)).eval()
    prefix = exact_prefix(model, torch.randint(2, 90, (1, 300)))
    cache = start_cache(model, lambda: KVCache(model, name), prefix)
    assert cache.weighs_tokens and cache.packed_calls == [1, 1]
    blind = KVCache(model, name)
    blind.prefill_from(prefix.cache)
    pairs = zip(cache.layers, blind.layers, strict=True)
    both = [[x.cache.dequantize()[1] for x in pair] for pair in pairs]
    assert not any(torch.equal(*pair) for pair in both)
