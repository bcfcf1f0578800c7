"""torch.compile over the torch implementation: one graph, no recompilation, the same bytes."""

import pytest
import torch
from torch._dynamo.utils import counters

from kivi import KVQuantizer, LayerCache, QuantSpec
from kivi.quantize import Pages, empty_pages, quantize_pack

pytestmark = pytest.mark.compile


def new_layer(max_length: int = 1000, **options: int) -> LayerCache:
    scheme = KVQuantizer.get("kivi", residual_length=32, sink_length=3, **options)
    return scheme.new_layer(
        batch_size=2, num_kv_heads=2, head_dim=32, dtype=torch.float32, max_length=max_length
    )


def step(layer: LayerCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return layer.decode(q, k, v)


def tokens(heads: int, t: int = 1) -> torch.Tensor:
    return torch.randn(2, heads, t, 32)


def test_decode_is_one_graph_for_600_steps_and_a_second_cache() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True)
    a, eager, second = new_layer(), new_layer(), new_layer()
    prompt = tokens(2, 70)
    for layer in (a, eager, second):
        layer.prefill(prompt, prompt)
    addresses = [t.data_ptr() for t in a._view()[2:]]
    for i in range(600):
        q, k, v = tokens(4), tokens(2), tokens(2)
        got = compiled(a, q, k, v)
        torch.testing.assert_close(got, eager.decode(q, k, v), atol=2e-5, rtol=1e-4)
        if i % 200 == 0:
            torch.testing.assert_close(
                compiled(second, q, k, v).isfinite().all(), torch.tensor(True)
            )
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert a.lengths() == eager.lengths() == [670, 670]
    assert a.packed_lengths() == eager.packed_lengths() == [608, 608]
    assert second.lengths() == [73, 73]
    assert addresses == [t.data_ptr() for t in a._view()[2:]]
    # Every page but the bin, in which masked writes land.
    for pages, expected in zip(a._view()[:2], eager._view()[:2], strict=True):
        for x, y in zip(pages[:3], expected[:3], strict=True):
            assert torch.equal(x[1:], y[1:])
    # An eager call after compiled ones reads the counters back.
    a.append(prompt, prompt)
    assert a.lengths() == [740, 740]


def test_compiled_decode_refuses_to_overflow() -> None:
    torch._dynamo.reset()
    layer = new_layer(max_length=71)
    layer.prefill(tokens(2, 70), tokens(2, 70))
    compiled = torch.compile(step, fullgraph=True)
    compiled(layer, tokens(4), tokens(2), tokens(2))
    with pytest.raises(RuntimeError, match="max_length"):
        compiled(layer, tokens(4), tokens(2), tokens(2))
    assert layer.lengths() == [71, 71]


def test_a_growing_cache_says_that_it_cannot_compile() -> None:
    torch._dynamo.reset()
    scheme = KVQuantizer.get("kivi")
    layer = scheme.new_layer(batch_size=2, num_kv_heads=2, head_dim=32, dtype=torch.float32)
    with pytest.raises(Exception, match="give a max_length"):
        torch.compile(step, fullgraph=True, backend="eager")(layer, tokens(4), tokens(2), tokens(2))
    assert layer.lengths() == [0, 0]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (QuantSpec(2, "channel", 32), torch.bfloat16),
        (QuantSpec(3, "token", 16, "least_squares"), torch.float32),
        (QuantSpec(4, "channel", 64, "symmetric"), torch.float16),
        (
            QuantSpec(2, "token", None, "unbiased", transform="hadamard", center=64),
            torch.bfloat16,
        ),
    ],
)
def test_compiled_quantize_pack_writes_the_same_bytes(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch._dynamo.reset()

    def run(words, scale, zero, center, norm, x, page, first):
        quantize_pack(Pages(words, scale, zero, center, norm), spec, x, page, first)

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    eager, other = (empty_pages(spec, 3, 2, 32, dtype) for _ in "ab")
    for first in (0, 128):
        x = (torch.randn(3, 2, 64, 32) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1, 1)).to(dtype)
        arguments = (x, torch.tensor([2, 0, 1]), torch.full((3,), first))
        run(*eager, *arguments)
        compiled(*other, *arguments)
        for a, b in zip(eager, other, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_impl_compile_equals_eager() -> None:
    torch._dynamo.reset()
    layers = [
        KVQuantizer.get("kivi", residual_length=32).new_layer(
            batch_size=2, num_kv_heads=2, head_dim=32, dtype=torch.float32, impl=impl
        )
        for impl in ("eager", "compile")
    ]
    for t in (90, 1, 1):
        q, k, v = tokens(4, t), tokens(2, t), tokens(2, t)
        a, b = (layer.decode(q, k, v) for layer in layers)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert layers[0].packed_lengths() == layers[1].packed_lengths() == [32, 32]
    for x, y in zip(layers[0].dequantize(), layers[1].dequantize(), strict=True):
        torch.testing.assert_close(x, y)
