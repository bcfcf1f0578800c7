"""The same promises on a GPU, where counters live on the device and steps become CUDA graphs."""

import pytest
import torch
from torch._dynamo.utils import counters

from kivi import KVQuantizer, LayerCache
from kivi.spec import Rope

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def new_layer(
    dtype: torch.dtype, max_length: int | None, name: str = "kivi", window: int | None = None
) -> LayerCache:
    options = (
        {"residual_length": 32} if name != "kivi" else {"residual_length": 32, "sink_length": 3}
    )
    return KVQuantizer.get(name, **options).new_layer(
        batch_size=2,
        num_kv_heads=2,
        head_dim=64,
        dtype=dtype,
        device="cuda",
        max_length=max_length,
        sliding_window=window,
    )


def tokens(heads: int, t: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, heads, t, 64, device="cuda", dtype=dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64; the queries are the last tokens."""
    t, n = q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    mask = torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("max_length", [None, 3000])
def test_no_prompt_waits_for_the_device(max_length: int | None) -> None:
    """Else the GPU stands still in every layer until the host has launched what comes next."""
    for mode in ("default", "error"):  # what is loaded and compiled once may wait
        layer = new_layer(torch.bfloat16, max_length)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for t in (1100, 700, 1, 900):
                layer.decode(*(tokens(heads, t, torch.bfloat16) for heads in (8, 2, 2)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert layer.packed_lengths() == [2656, 2656]


# Attention of the others leaves something out (`KVSpec.sparse`).
READS_ALL = [n for n in KVQuantizer.available() if KVQuantizer.get(n).spec().sparse is None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", READS_ALL)
def test_decode_against_float64(name: str, dtype: torch.dtype) -> None:
    layer = new_layer(dtype, None, name)
    for t in (700, 1, 40, 1, 33, 5):
        q, k, v = tokens(8, t, dtype), tokens(2, t, dtype), tokens(2, t, dtype)
        past = layer.dequantize()
        expected = attention(q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        got = layer.decode(q, k, v).double()
        error = (got - expected).norm() / expected.norm()
        assert error < {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert max(layer.packed_lengths()) > 512


@pytest.mark.parametrize("name", KVQuantizer.available())
def test_pages_equal_the_cpu_s(name: str) -> None:
    layer = new_layer(torch.float32, None, name)
    k = tokens(2, 1100, torch.float32)
    layer.prefill(k, k)
    other = KVQuantizer.get(name, residual_length=32)
    cpu = LayerCache(layer.spec if name == "kivi" else other.spec(), 2, 2, 64, dtype=torch.float32)
    cpu.prefill(k.cpu(), k.cpu())
    for a, b in zip(layer.dequantize(), cpu.dequantize(), strict=True):
        wrong = (a.cpu() - b).abs() > 1e-5
        assert wrong.float().mean() < 1e-5  # a tie may round the other way


def run_steps(compiled, layer: LayerCache, eager: LayerCache, steps: int) -> None:
    for _ in range(steps):
        q, k, v = (tokens(h, 1, torch.float16) for h in (8, 2, 2))
        got = compiled(layer, q, k, v).clone()
        torch.testing.assert_close(got, eager.decode(q, k, v), atol=3e-3, rtol=3e-3)


def test_reduce_overhead_captures_without_skips() -> None:
    torch._dynamo.reset()
    counters.clear()
    layer, second, eager = (new_layer(torch.float16, 2000) for _ in range(3))
    prompt = tokens(2, 100, torch.float16)
    for each in (layer, second, eager):
        each.prefill(prompt, prompt)
    compiled = torch.compile(
        lambda layer, q, k, v: layer.decode(q, k, v), fullgraph=True, mode="reduce-overhead"
    )
    run_steps(compiled, layer, eager, 600)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert layer.packed_lengths() == eager.packed_lengths() == [640, 640]
    reference = new_layer(torch.float16, 2000)
    reference.prefill(prompt, prompt)
    run_steps(compiled, second, reference, 40)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(("window", "held"), [(None, 100), (200, 1500)])
def test_manual_cuda_graph_replays(window: int | None, held: int) -> None:
    """With a window, a page is written again in the middle of the replays."""
    layer, eager = (new_layer(torch.float16, 3000, window=window) for _ in range(2))
    prompt = tokens(2, held, torch.float16)
    for each in (layer, eager):
        each.prefill(prompt, prompt)
    q, k, v = (tokens(h, 1, torch.float16) for h in (8, 2, 2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up on a fork: it must not count
        layer.fork().decode(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.decode(q, k, v)
    for _ in range(200):
        for x, h in ((q, 8), (k, 2), (v, 2)):
            x.copy_(tokens(h, 1, torch.float16))
        graph.replay()
        torch.testing.assert_close(out, eager.decode(q, k, v), atol=3e-3, rtol=3e-3)
    assert layer.lengths() == eager.lengths() == [held + 200, held + 200]
    packed = layer.packed_lengths()
    assert packed == eager.packed_lengths()
    assert layer._pages.forgotten(packed) == [0 if window is None else 1024] * 2


def test_sinks_turn_in_replays() -> None:
    """A window of the scheme's own: what it drops is counted on the device."""
    half, size = 32, {"batch_size": 2, "num_kv_heads": 2, "head_dim": 64, "max_length": 900}
    frequency = [0.5**i for i in range(half)]
    rope = Rope((*frequency, *(-f for f in frequency)), (*range(half, 64), *range(half)))
    scheme = KVQuantizer.get("streaming_llm", window=200, residual_length=32)
    layer, eager = (
        scheme.new_layer(**size, dtype=torch.float16, device="cuda", rope=rope) for _ in range(2)
    )
    prompt = tokens(2, 150, torch.float16)
    for each in (layer, eager):
        each.prefill(prompt, prompt)
    q, k, v = (tokens(h, 1, torch.float16) for h in (8, 2, 2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.fork().decode(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.decode(q, k, v)
    for _ in range(120):
        for x, h in ((q, 8), (k, 2), (v, 2)):
            x.copy_(tokens(h, 1, torch.float16))
        graph.replay()
        torch.testing.assert_close(out, eager.decode(q, k, v), atol=3e-3, rtol=3e-3)
    assert layer.lengths() == eager.lengths() == [270, 270]


def tiny_llama():
    """A random model that prefers some tokens clearly."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def test_generate_loop_records_once() -> None:
    from torch._inductor import cudagraph_trees

    from kivi.hf import KVCache
    from kivi.hf_loop import generate_loop

    torch._dynamo.reset()
    counters.clear()
    model, recorded = tiny_llama(), []
    ids = torch.randint(2, 256, (2, 200), device="cuda")
    expected = model.generate(ids, max_new_tokens=80, do_sample=False)[:, 200:]
    cache = KVCache(model, "full_precision", residual_length=32, max_length=320)
    for _ in range(4):
        assert torch.equal(generate_loop(model, cache, ids, 80), expected)
        cache.reset()
        manager = cudagraph_trees.get_container(0).tree_manager
        recorded.append(manager.new_graph_id().id)  # this takes a number itself
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recorded[-1] - recorded[-2] == 1  # no graph since the conversation before
    sampled = generate_loop(model, cache, ids, 80, temperature=1.0, top_k=50)
    assert len(sampled.unique()) > 10
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_generate_drops_tokens_compiled_as_eager() -> None:
    from kivi.hf import KVCache

    torch._dynamo.reset()
    model = tiny_llama()
    ids = torch.randint(2, 256, (2, 200), device="cuda")
    scheme = KVQuantizer.get("streaming_llm", window=220, residual_length=32)
    got = [
        model.generate(
            ids,
            past_key_values=KVCache(model, scheme, max_length=max_length),
            max_new_tokens=80,
            do_sample=False,
        )
        for max_length in (None, 320)
    ]
    assert torch.equal(*got)


def test_generate_compiles_by_itself() -> None:
    transformers = pytest.importorskip("transformers")
    from kivi.hf import KVCache

    torch._dynamo.reset()
    counters.clear()
    model = tiny_llama()
    ids = torch.randint(2, 256, (2, 200), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 80, "do_sample": False}
    expected = model.generate(ids, past_key_values=transformers.DynamicCache(), **arguments)
    graphs = []
    for _ in range(2):
        cache = KVCache(model, "full_precision", residual_length=32, max_length=320)
        got = model.generate(ids, past_key_values=cache, **arguments)
        assert torch.equal(got, expected)
        assert max(cache.layers[0].cache.packed_lengths()) > 0
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0  # the second cache did not compile again
    assert counters["inductor"]["cudagraph_skips"] == 0
