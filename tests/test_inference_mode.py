"""Caches live longer than the mode they were made or grown in."""

import copy

import pytest
import torch

from kivi import KVQuantizer


@pytest.mark.parametrize("max_length", [None, 3000])
def test_a_cache_goes_on_after_inference_mode(max_length: int | None) -> None:
    def tokens(t: int) -> torch.Tensor:
        return torch.randn(2, 2, t, 16)

    options = {"num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    with torch.inference_mode():
        layer = KVQuantizer.get("kivi").new_layer(batch_size=2, max_length=max_length, **options)
        layer.prefill(tokens(900), tokens(900))
        layer.select([1, 0])
        child = layer.fork()
        child.select([0, 1, 0])
        copied = copy.deepcopy(layer)
        copied.crop(30)
    for each, rows in ((layer, 2), (child, 3), (copied, 2)):
        k = torch.randn(rows, 2, 700, 16)
        each.append(k, k)
        each.decode(k[:, :, :1], k[:, :, :1], k[:, :, :1])
        each.crop(900)
        with torch.inference_mode():
            each.append(k, k)
        each.reset()
        each.prefill(k, k)
        assert each.lengths() == [700] * rows
