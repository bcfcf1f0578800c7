"""decode() against float64 attention over what the cache holds."""

import dataclasses
import math

import pytest
import torch
from cache_checks import KIVI, check_decode, every_spec, new, randn, tokens
from one_thread import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from kivi import KVQuantizer, KVSpec, QuantSpec
from kivi.attention import Ops
from kivi.spec import OpaqueSpec
from kivi.steps import Steps
from kivi.store import SLACK


# ---------------------------------------------------------------- decode
def masks(kind: str, t: int, batch: int = 3) -> torch.Tensor | None:
    """Which of t columns are tokens, for rows that differ."""
    rows = torch.tensor([t, max(0, t - 2), t // 2])[:batch, None]
    column = torch.arange(t).expand(batch, t)
    return {
        "none": None,
        "left": column >= t - rows,
        "right": column < rows,
        "holes": (column * 7 + torch.arange(batch)[:, None]) % 3 > 0,
        "empty row": (torch.arange(batch)[:, None] != 1) & (column >= 0),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes", "empty row"])
@pytest.mark.parametrize("t", [1, 2, 3, 17, SLACK - 1, SLACK, SLACK + 1, 90])
@pytest.mark.parametrize("before", [0, 20, 590])
def test_decode(before, t, kind):
    layer = new(KIVI, batch=3, hkv=2, d=32, dv=16)
    if before:
        layer.prefill(
            *tokens(layer, before),
            torch.arange(before) < torch.tensor([[before], [before // 2], [9]]),
        )
    for step in range(2):
        check_decode(layer, t, valid=masks(kind, t), seed=50 + step)


@every_spec
@pytest.mark.parametrize("t", [1, 40])
@pytest.mark.parametrize("ratio", [1, 7])
def test_decode_every_spec_and_head_ratio(spec, t, ratio):
    layer = new(spec, batch=2, hkv=2, d=32, dv=64, dtype=torch.float16)
    layer.prefill(*tokens(layer, 700))
    check_decode(layer, t, ratio)


DECODE_OPTIONS = [
    dict(scale=0.9),
    dict(sliding_window=1),
    dict(sliding_window=13),
    dict(sliding_window=100),
    dict(softcap=1.5),
    dict(s_aux=torch.tensor([0.5, -1.0, 6.0, 0.0])),
    dict(sliding_window=13, softcap=2.0, s_aux=torch.tensor([1.0, -1.0, 2.0, 0.0]), scale=0.4),
]


@pytest.mark.parametrize("options", DECODE_OPTIONS, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("t", [1, 5, SLACK, 50])
@pytest.mark.parametrize("before", [0, 150])
def test_decode_options(before, t, kind, options):
    layer = new(KIVI, batch=3, hkv=2, d=32)
    if before:
        layer.prefill(
            *tokens(layer, before), torch.arange(before) < torch.tensor([[before], [40], [9]])
        )
    check_decode(layer, t, valid=masks(kind, t), **options)


@pytest.mark.parametrize("batch_mask", [True, False])
@pytest.mark.parametrize("options", [{}, DECODE_OPTIONS[-1]], ids=["plain", "options"])
@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.parametrize("t", [1, 6, SLACK, 45])
@pytest.mark.parametrize("before", [0, 150])
def test_decode_with_a_mask_of_the_callers(before, t, kind, options, batch_mask):
    """Tree drafts, bidirectional blocks: any mask in place of causal order."""
    layer = new(KIVI, batch=3, hkv=2, d=32)
    if before:
        layer.prefill(*tokens(layer, before))
    mask = torch.rand(3 if batch_mask else 1, 1, t, t) < 0.6
    mask = mask | torch.eye(t, dtype=torch.bool)
    check_decode(layer, t, valid=masks(kind, t), mask=mask, **options)


def test_decode_on_an_empty_cache_is_exact_prefill_attention():
    for t in (1, SLACK, SLACK + 1, 300):
        layer = new(KVSpec(QuantSpec(1, "token", 16), QuantSpec(1, "token", 16), 0), batch=1, hkv=2)
        k, v = tokens(layer, t)
        q = randn(1, 6, t, 16)
        out = layer.decode(q, k, v)
        shared = [x.repeat_interleave(3, 1).double() for x in (k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.double(), *shared, is_causal=True
        )
        assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("t", [1, 40])
def test_dropped_tokens_are_never_seen_again(t):
    """NaN in tokens that were cropped, wherever they lay: window, sinks, pages."""
    for before, bad in [(10, 5), (200, 20), (200, 150), (600, 590), (40, 40)]:
        layer = new(KIVI, batch=2)
        k, v = tokens(layer, before)
        k[:, :, before - bad :], v[:, :, before - bad :] = math.nan, math.nan
        layer.prefill(k, v)
        layer.crop(bad)
        assert all(x.isfinite().all() for x in layer.dequantize())
        check_decode(layer, t)
        check_decode(layer, t, seed=51)
        assert all(x.isfinite().all() for x in layer.dequantize())


def test_a_reset_forgets_nan():
    layer = new(KIVI, max_length=700)
    k, v = tokens(layer, 600)
    layer.prefill(k * math.nan, v * math.nan)
    layer.reset()
    for t in (3, 40, 200):
        check_decode(layer, t)


def test_nothing_that_is_stored_keeps_a_graph():
    layer = new(KIVI, max_length=700)
    for t in (1, 40, 300):
        q = randn(2, 2, t, 16).requires_grad_()
        k, v = (x.requires_grad_() for x in tokens(layer, t))
        assert not layer.decode(q, k, v).requires_grad
        layer.append(k * 1, v * 1)
    layer.crop(300)
    layer.select([1, 0])
    assert not any(x.requires_grad for x in (*layer.dequantize(), *layer.fork().dequantize()))


LEVEL = torch.nn.Parameter(torch.tensor(0.25))


@dataclasses.dataclass(frozen=True)
class Learned(OpaqueSpec):
    """A byte for each element, times a parameter that somebody trains."""

    bits: int = 8

    def nbytes(self, head_dim):
        return head_dim

    def encode(self, x, valid):
        return ((x / LEVEL).round().clamp(-127, 127).to(torch.int8).flatten(-2),)

    def decode(self, data, head_dim):
        return data.view(torch.int8).unsqueeze(-2) * LEVEL


@pytest.mark.parametrize("t", [1, 40])
def test_formats_with_parameters_have_no_gradient(t):
    layer = new(KVSpec(Learned(), Learned(), residual_length=0))
    layer.prefill(*tokens(layer, 40))
    out = layer.decode(randn(2, 2, t, 16), *tokens(layer, t))
    assert layer.packed_lengths()[0] > 0
    assert torch.is_grad_enabled() and not out.requires_grad


class Launches(TorchDispatchMode):
    """Counts the operators that are not views: on a GPU each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or op._schema.name == "aten::_unsafe_view")
        return op(*args, **kwargs or {})


@pytest.mark.parametrize(("sinks", "launches"), [(0, 4), (4, 4)])
def test_a_step_launches_little_besides_attention(sinks: int, launches: int) -> None:
    """No unit leaves the window on most steps: then only new tokens and lengths are written."""
    layer = KVQuantizer.get("kivi", residual_length=32, sink_length=sinks).new_layer(
        batch_size=2, num_kv_heads=1, head_dim=32, max_length=600, dtype=torch.float32
    )
    layer._ops = layer._ops._replace(decode_attention=lambda q, *_: (q, None))
    k = torch.randn(2, 1, 200, 32)
    layer.prefill(k, k)
    counts = []
    for _ in range(64):
        with Launches() as mode:
            layer.decode(k[:, :, :1], k[:, :, :1], k[:, :, :1])
        counts.append(mode.count)
    assert sum(n <= launches for n in counts) == 62  # a unit leaves on two of them


def test_a_prompt_launches_little_besides_attention() -> None:
    """Pages and not units: of a short prompt the GPU is done before the host is."""
    shared, packs = Steps(), []
    for most in ([60] * 3, [24, 40, 40]):  # the second layer finds the steps worked out
        layer = KVQuantizer.get("kivi").new_layer(
            batch_size=2, num_kv_heads=1, head_dim=32, dtype=torch.float32
        )
        layer.steps, counts = shared, []
        layer._ops = Ops(
            lambda *_: packs.append(1), lambda q, *_: (q, None), lambda q, *_: (q, None)
        )
        for t in (2048, 2048, 1000):
            k = torch.zeros(2, 1, t, 32)
            with Launches() as mode:
                layer.decode(k, k, k)
            counts.append(mode.count)
        assert all(n <= bound for n, bound in zip(counts, most, strict=True)), counts
    assert len(packs) == 2 * (2 + 10 + 12)  # the last prompt neither begins nor ends with a page
