"""A LayerCache on kernels does what it does on plain torch; in Triton's interpreter on the CPU."""

import pytest
import torch

from kivi import KVQuantizer

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
# The interpreter computes with numpy, which warns of NaN and overflow.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *[pytest.mark.gpu] * GPU]
DEVICE = "cuda" if GPU else "cpu"


@pytest.mark.parametrize("name", ["kivi", "per_token", "per_channel", "full_precision"])
def test_layer_on_kernels(name):
    scheme = KVQuantizer.get(name, residual_length=32)
    eager, kernels = (
        scheme.new_layer(
            batch_size=2,
            num_kv_heads=1,
            head_dim=32,
            dtype=torch.float32,
            device=DEVICE,
            impl=impl,
        )
        for impl in ("eager", "triton")
    )
    assert kernels._ops.decode_attention is not eager._ops.decode_attention
    assert kernels._ops.quantize_pack is not eager._ops.quantize_pack
    for t in (200, 1, 40, 2):
        q, k, v = (torch.randn(2, heads, t, 32, device=DEVICE) for heads in (3, 1, 1))
        valid = torch.ones(2, t, dtype=torch.bool, device=DEVICE)
        valid[1, : t // 3] = False
        expected, out = (layer.decode(q, k, v, valid=valid) for layer in (eager, kernels))
        seen = valid[:, None, :, None]
        torch.testing.assert_close(out * seen, expected * seen, atol=1e-5, rtol=1e-4)
    for pages, others in zip(kernels._view()[:2], eager._view()[:2], strict=True):
        for x, y in zip(pages, others, strict=True):
            assert x is y is None or torch.equal(x[1:], y[1:])  # page 0 is the bin
    kernels.crop(5)
    assert kernels.lengths() == [238, 159]
    assert max(kernels.packed_lengths()) > 0


@pytest.mark.parametrize("max_length", [None, 2000])
def test_pages_that_come_round(max_length):
    """Kernels read a table whose oldest columns show newer tokens."""
    eager, kernels = (
        KVQuantizer.get("kivi", residual_length=32).new_layer(
            batch_size=1,
            num_kv_heads=1,
            head_dim=32,
            max_length=max_length,
            sliding_window=200,
            dtype=torch.float32,
            device=DEVICE,
            impl=impl,
        )
        for impl in ("eager", "triton")
    )
    for t in (1500, 1, 130, 3):
        q, k, v = (torch.randn(1, heads, t, 32, device=DEVICE) for heads in (2, 1, 1))
        if t > 500:  # slow in the interpreter
            eager.append(k, v)
            kernels.append(k, v)
        else:
            expected, out = (layer.decode(q, k, v) for layer in (eager, kernels))
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert kernels._pages.forgotten(kernels.packed_lengths()) == [1024]
    for x, y in zip(kernels.dequantize(), eager.dequantize(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tokens", [3, 40])
def test_sink_logits_of_any_layout(tokens):
    """Every second of more logits, or one for all heads: kernels read them side by side."""
    eager, kernels = (
        KVQuantizer.get("kivi", residual_length=32).new_layer(
            batch_size=1,
            num_kv_heads=2,
            head_dim=32,
            dtype=torch.float32,
            device=DEVICE,
            impl=impl,
        )
        for impl in ("eager", "triton")
    )
    for s_aux in (torch.randn(8)[::2], torch.tensor([2.0]).expand(4)):
        q, k, v = (torch.randn(1, heads, tokens, 32, device=DEVICE) for heads in (4, 2, 2))
        expected, out = (x.decode(q, k, v, s_aux=s_aux.to(DEVICE)) for x in (eager, kernels))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_mapped_prompt_in_pieces():
    """A second piece of a prompt attends before any token of the first one is packed."""
    eager, kernels = (
        KVQuantizer.get("quarot", residual_length=64).new_layer(
            batch_size=1,
            num_kv_heads=1,
            head_dim=32,
            dtype=torch.float32,
            device=DEVICE,
            impl=impl,
        )
        for impl in ("eager", "triton")
    )
    for t in (20, 40):
        q, k, v = (torch.randn(1, heads, t, 32, device=DEVICE) for heads in (2, 1, 1))
        expected, out = (layer.decode(q, k, v) for layer in (eager, kernels))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert kernels.packed_lengths() == [0]


def test_a_device_without_kernels_is_refused():
    from kivi.kernels import triton_ops

    if GPU or not triton_ops.INTERPRETED:
        with pytest.raises(ValueError, match=r"impl='triton' cannot serve.*device='cpu'"):
            KVQuantizer.get("kivi").new_layer(
                batch_size=1, num_kv_heads=1, head_dim=32, impl="triton"
            )
    with pytest.raises(ValueError, match=r"impl='triton' cannot serve.*head dimension 1024"):
        KVQuantizer.get("kivi").new_layer(
            batch_size=1, num_kv_heads=1, head_dim=1024, impl="triton", device=DEVICE
        )
