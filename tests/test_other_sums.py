"""Pages are the same wherever they are made: without a GPU, under sums and functions that err.

Devices, versions and compilers differ in the order of sums and in the last bit of exp, log and the
like. What is stored must not show it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kivi import KVQuantizer, LayerCache
from kivi.schemes.kvarn import normalize

NAMES = KVQuantizer.available()
CALLS = torch.ops.aten
PRODUCTS = (CALLS.mm.default, CALLS.bmm.default)
# Not exp2: only whole numbers are given to it, of which it is exact.
FUNCTIONS = ("exp", "log", "log2", "sin", "cos", "atan2", "_softmax", "linalg_vector_norm")


class OtherSums(TorchDispatchMode):
    """Floating-point results are off by about what another order of sums would change."""

    def __torch_dispatch__(
        self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = call(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype not in (torch.float32, torch.float64):
            return out
        eps, noise = torch.finfo(out.dtype).eps, torch.randn_like(out)
        if call in PRODUCTS:
            return out + eps * noise * call(args[0].square(), args[1].square()).sqrt()
        if call is CALLS.sum.dim_IntList:
            return out + eps * noise * call(args[0].square(), *args[1:], **(kwargs or {})).sqrt()
        if call.overloadpacket.__name__ in FUNCTIONS:
            return out * (1 + eps * noise.sign())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_pages_do_not_depend_on_the_order_of_sums(name: str) -> None:
    spec = KVQuantizer.get(name).spec()
    tokens = torch.randn(2, 2, spec.sink_length + spec.residual_length + 640, 64)
    layers = [LayerCache(spec, 2, 2, 64, dtype=torch.float32, impl="eager") for _ in range(2)]
    layers[0].prefill(tokens, tokens)
    with OtherSums():
        layers[1].prefill(tokens, tokens)
    assert torch.equal(*(torch.cat(layer.dequantize(), -1) for layer in layers))


def test_the_other_sums_are_others() -> None:
    x = torch.randn(64, 64)
    with OtherSums():
        others = x @ x, x.sum(-1), x.norm(dim=-1), x.exp()
    for one, other in zip((x @ x, x.sum(-1), x.norm(dim=-1), x.exp()), others, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_normalization_chooses_no_step_by_rounding(seed: int) -> None:
    """Of kvarn: its last steps are equally good, but have other scales."""
    x = torch.randn(8, 64, 128, generator=torch.Generator().manual_seed(seed))
    every = torch.ones_like(x, dtype=torch.bool)
    scales = normalize(x, every, 16)
    others = normalize(x.flip(-2, -1), every, 16)
    for one, other in zip(scales, others, strict=True):
        torch.testing.assert_close(one, other.flip(-2, -1), rtol=1e-12, atol=0)
