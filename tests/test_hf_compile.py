"""A decode step of a whole model is one graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, close, forward, generate, prompt, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    CompileConfig,
    DynamicCache,
)

from kivi import KVQuantizer
from kivi.hf import KVCache


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


@pytest.mark.compile
def test_compiled_dense() -> None:
    """What needs dense keys cannot be compiled, and says what to do."""
    model, inputs = tiny("llama"), prompt()
    cache = KVCache(model, LOSSLESS, max_length=128)
    forward(model, cache, inputs["input_ids"])
    model.set_attn_implementation("eager")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="disable_compile=True"):
        forward(compiled, cache, torch.full((2, 1), 5))
    with pytest.warns(UserWarning, match="needs dense"):
        assert forward(model, cache, torch.full((2, 1), 5)).isfinite().all()


@pytest.mark.compile
def test_padding_behind_a_graph_break() -> None:
    """Keys and values come in a graph, attention over them runs between two graphs."""
    model = tiny("llama", num_hidden_layers=1)
    q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    mask = torch.zeros(2, 1, 5, 64, dtype=torch.bool)
    mask[..., :5] = torch.ones(5, 5, dtype=torch.bool).tril() & valid[:, None, None]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, key, value, mask, enable_gqa=True)

    def step(cache: KVCache) -> Tensor:
        return attend(*cache.update(k, v, 0))

    eager, broken = (KVCache(model, LOSSLESS, max_length=64) for _ in "ab")
    expected = step(eager)
    step(broken)  # allocates
    broken.reset()
    out = torch.compile(step, backend="eager")(broken)
    torch.testing.assert_close(out.transpose(1, 2)[valid], expected.transpose(1, 2)[valid])
    kept = [cache.packed_layers[0].columns.padding for cache in (eager, broken)]
    assert [(first, x.tolist()) for first, x in kept[0]] == [(0, valid.tolist())]
    assert [(first, x.tolist()) for first, x in kept[1]] == [(0, valid.tolist())]
    assert broken.packed_calls == [2]
