"""What the tests of LayerCache share: layers of many kinds, and what may be observed of them."""

import math

import numpy as np
import pytest
import torch
from oracle_kivi import allowed_keys, array, attention

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.packing import unpack

KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 32, 3)
SPECS = {
    "kivi": KIVI,
    "exact": KVSpec(None, None, 16, 0),
    "no window": KVSpec(QuantSpec(3, "token", 16), QuantSpec(1, "channel", 64), 0, 2),
    "pages": KVSpec(QuantSpec(4, "channel", None, "symmetric"), QuantSpec(8, "token", None), 5, 0),
    "refit": KVSpec(
        QuantSpec(2, "channel", 128, "least_squares"),
        QuantSpec(2, "token", 16, "least_squares"),
        40,
        1,
    ),
    "keys exact": KVSpec(None, QuantSpec(3, "channel", 16), 20, 0),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def new(spec=KIVI, batch=2, hkv=1, d=16, dv=None, max_length=None, dtype=torch.float32, **options):
    return LayerCache(spec, batch, hkv, d, dv, max_length=max_length, dtype=dtype, **options)


def tokens(layer: LayerCache, t: int, seed: int = 0, batch: int | None = None):
    """T columns of keys and values that fit a layer."""
    b, h = layer.batch_size if batch is None else batch, layer.num_kv_heads
    k = randn(b, h, t, layer.head_dim, dtype=layer.dtype, seed=2 * seed)
    return k, randn(b, h, t, layer.value_head_dim, dtype=layer.dtype, seed=2 * seed + 1)


def filled(t: int, spec=KIVI, seed: int = 0, **options) -> LayerCache:
    layer = new(spec, **options)
    layer.prefill(*tokens(layer, t, seed))
    return layer


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def state(x, seen=None):
    """All that an object holds, down to the bits of its tensors, as something that compares."""
    seen = set() if seen is None else seen
    if isinstance(x, torch.Tensor):
        return (tuple(x.shape), x.dtype, x.data_ptr(), bits(x).numpy().tobytes())
    if isinstance(x, dict):
        return [(k, state(v, seen)) for k, v in x.items()]
    if isinstance(x, list | tuple):
        return [state(v, seen) for v in x]
    if type(x).__module__.startswith("kivi.") and hasattr(x, "__dict__"):
        if id(x) in seen:
            return "again"
        seen.add(id(x))
        return [type(x).__name__, state(vars(x), seen)]
    return x


def held_tensors(x, found=None) -> dict[int, int]:
    """Bytes of every storage that is reachable from an object."""
    found = {} if found is None else found
    if isinstance(x, torch.Tensor):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict):
        for v in x.values():
            held_tensors(v, found)
    elif isinstance(x, list | tuple):
        for v in x:
            held_tensors(v, found)
    elif type(x).__module__.startswith("kivi.") and hasattr(x, "__dict__"):
        held_tensors(vars(x), found)
    return found


def addresses(layer: LayerCache) -> list[int]:
    view = layer._view()
    flat = [*view.key, *view.value, *view[2:]]
    return [t.data_ptr() for t in flat if t is not None]


def used_pages(layer: LayerCache) -> list[list[torch.Tensor]]:
    """Codes and metadata of the packed tokens of each row, in order, cut to what is packed."""
    rows = []
    for row, packed in enumerate(layer.packed_lengths()):
        parts = []
        for pages, spec in (
            (layer._view().key, layer.spec.key),
            (layer._view().value, layer.spec.value),
        ):
            index = torch.tensor(layer._pages.rows[row][: -(-packed // 512)], dtype=torch.int64)
            for tensor in pages:
                if tensor is None:
                    continue
                x = tensor[index]
                if tensor is pages.words and isinstance(spec, QuantSpec):
                    x = unpack(x, spec.bits)
                per_page = x.shape[2]
                parts.append(x.transpose(0, 1).flatten(1, 2)[:, : packed * per_page // 512])
        rows.append(parts)
    return rows


def same_packed(a: LayerCache, b: LayerCache) -> bool:
    pairs = zip(used_pages(a), used_pages(b), strict=True)
    return a.packed_lengths() == b.packed_lengths() and all(
        same(x, y) for one, two in pairs for x, y in zip(one, two, strict=True)
    )


def same_cache(a: LayerCache, b: LayerCache) -> bool:
    """Equal in all that can be observed: packed bytes, lengths, dense tokens."""
    dense = zip(a.dequantize(), b.dequantize(), strict=True)
    return a.lengths() == b.lengths() and same_packed(a, b) and all(same(x, y) for x, y in dense)


def references_are_right(*layers: LayerCache) -> bool:
    """Every page is counted once for each row that refers to it, the bin once for ever."""
    pool = layers[0]._pages.pool
    assert all(layer._pages.pool is pool for layer in layers)
    count = [1] + [0] * (len(pool.references) - 1)
    for layer in layers:
        for row in layer._pages.rows:
            for page in row:
                count[page] += 1
    return count == pool.references


def check_decode(layer: LayerCache, t: int, ratio: int = 2, valid=None, seed: int = 50, **options):
    """One decode against float64 attention over what the cache held and the exact new tokens."""
    lengths = layer.lengths()
    past = layer.dequantize()
    k, v = tokens(layer, t, seed)
    q = randn(
        layer.batch_size,
        layer.num_kv_heads * ratio,
        t,
        layer.head_dim,
        dtype=layer.dtype,
        seed=seed,
    )
    dirty = k, v
    if valid is not None:
        dirty = [torch.where(valid[:, None, :, None], x, math.nan) for x in (k, v)]
    out = layer.decode(q, *dirty, valid=valid, **options)
    assert out.shape == (*q.shape[:3], layer.value_head_dim) and out.dtype == layer.dtype
    eps = torch.finfo(layer.dtype).eps if layer.dtype != torch.float32 else 2**-16
    scale, mask, s_aux = (options.get(x) for x in ("scale", "mask", "s_aux"))
    scale = layer.head_dim**-0.5 if scale is None else scale
    for row, n in enumerate(lengths):
        seen = np.ones(t, bool) if valid is None else valid[row].numpy()
        own = None if mask is None else mask[row % len(mask), 0].numpy()
        allowed = allowed_keys(n, seen, options.get("sliding_window"), own)
        both = [torch.cat([x[row, :, :n], y[row]], 1) for x, y in zip(past, (k, v), strict=True)]
        expected = attention(
            array(q[row]),
            *(array(x) for x in both),
            allowed,
            scale,
            options.get("softcap"),
            None if s_aux is None else array(s_aux),
        )
        got = out[row][:, seen]
        assert got.isfinite().all()
        assert (
            np.abs(array(got) - expected[:, seen]).max(initial=0)
            <= eps * np.abs(expected).max() + 2**-16
        )
        added = n + int(seen.sum())
        assert layer.lengths()[row] == added
