"""Packing: the identity, at every place of a page, and nothing else touched."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_thread import one_thread  # noqa: F401
from oracle_kivi import read_codes

from kivi.packing import insert, pack_unit, units_per_tile, unpack, widths
from kivi.spec import BITS, PAGE_TOKENS

RUNS = (32, 64, 128, 256, 512)


def noise(pages: int, heads: int, bits: int, channels: int) -> torch.Tensor:
    """Pages of words with every bit random, the sign bit as well."""
    shape = (pages, heads, bits, 32, channels)
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)


def put(words: torch.Tensor, codes: torch.Tensor, bits: int, first: torch.Tensor) -> torch.Tensor:
    """`words` with the codes `[N, H, U, D]` in run `first [N]` of page N."""
    words, page = words.clone(), torch.arange(words.shape[0])[:, None]
    for part in pack_unit(codes, bits, first):
        words[page, :, part.tile] = insert(words[page, :, part.tile], part)
    return words


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("run", RUNS)
def test_every_run_comes_back_and_the_others_are_untouched(bits, run):
    for start in range(0, PAGE_TOKENS, run):
        # The second page takes its run somewhere else, in the same call.
        first = torch.tensor([start, (start + run) % PAGE_TOKENS])
        words = noise(2, 2, bits, 3)
        codes = torch.randint(0, 2**bits, (2, 2, run, 3), dtype=torch.int16)
        expected = unpack(words, bits)
        for page, offset in enumerate(first.tolist()):
            expected[page, :, offset : offset + run] = codes[page]
        assert torch.equal(unpack(put(words, codes, bits, first), bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_in_every_field(bits):
    """All zeros into all ones and back, so that no mask is a bit too narrow or too wide."""
    for value, around in ((0, -1), (2**bits - 1, 0)):
        for start in range(0, PAGE_TOKENS, 32):
            words = torch.full((1, 1, bits, 32, 2), around, dtype=torch.int16)
            codes = torch.full((1, 1, 32, 2), value, dtype=torch.int16)
            new = unpack(put(words, codes, bits, torch.tensor([start])), bits)
            expected = torch.full((1, 1, PAGE_TOKENS, 2), 2**bits - 1 - value, dtype=torch.int16)
            expected[:, :, start : start + 32] = value
            assert torch.equal(new, expected)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(bits):
    words = noise(1, 1, bits, 2)
    assert np.array_equal(unpack(words, bits)[0, 0].numpy(), read_codes(words[0, 0].numpy(), bits))


@pytest.mark.parametrize("bits", BITS)
def test_one_call_for_a_page_equals_many_for_its_runs(bits):
    codes = torch.randint(0, 2**bits, (1, 2, PAGE_TOKENS, 3), dtype=torch.int16)
    whole = put(noise(1, 2, bits, 3), codes, bits, torch.tensor([0]))
    for run in RUNS:
        words = noise(1, 2, bits, 3)
        for start in torch.randperm(PAGE_TOKENS // run).tolist():
            piece = codes[:, :, start * run : (start + 1) * run]
            words = put(words, piece, bits, torch.tensor([start * run]))
        assert torch.equal(words, whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", BITS)
def test_any_integer_dtype(bits, dtype):
    codes = torch.randint(0, 2**bits, (1, 1, PAGE_TOKENS, 1)).to(dtype)
    words = put(noise(1, 1, bits, 1), codes, bits, torch.tensor([0]))
    assert torch.equal(unpack(words, bits), codes.to(torch.int16))


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_page_is_used_once(bits):
    """A page is `bits` tiles of 16-bit words: exactly `bits` for an element, also for 3."""
    assert sum(widths(bits)) == bits
    words = noise(1, 1, bits, 1)
    assert words.numel() * 16 == PAGE_TOKENS * bits
    codes = unpack(words, bits)
    assert torch.equal(put(torch.zeros_like(words), codes, bits, torch.tensor([0])), words)
    # ... so that unpacking is one to one: a flipped bit changes exactly one code, by a power of 2.
    for tile in range(bits):
        for bit in range(16):
            flipped = words.clone()
            flipped[:, :, tile] = (words[:, :, tile].int() ^ (1 << bit)).to(torch.int16)
            change = (unpack(flipped, bits) - codes).abs()
            assert (change > 0).sum() == 32
            assert (change.unique() & (change.unique() - 1)).sum() == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("run", RUNS)
def test_runs_a_stride_apart_share_no_tile(bits, run):
    stride = units_per_tile(bits, run)
    count = PAGE_TOKENS // run
    tiles = []
    for start in range(count):
        codes = torch.zeros(1, 1, run, 1, dtype=torch.int16)
        parts = pack_unit(codes, bits, torch.tensor([start * run]))
        tiles.append({t for part in parts for t in part.tile.flatten().tolist()})
    for i in range(count):
        for j in range(i + stride, count, stride):
            assert tiles[i].isdisjoint(tiles[j])
    # No more careful than needed: neighbours within a stride do share one.
    assert all(tiles[i] & tiles[i - i % stride] for i in range(count))


@given(
    bits=st.sampled_from(BITS),
    writes=st.lists(
        st.tuples(st.sampled_from(RUNS), st.integers(0, 15), st.integers(0, 2**32)), max_size=12
    ),
)
def test_any_sequence_of_writes(bits, writes):
    """The last write of a token counts, whatever order and sizes the runs come in."""
    words = noise(1, 1, bits, 2)
    expected = unpack(words, bits)
    for run, position, seed in writes:
        start = position * 32 // run * run
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (1, 1, run, 2), generator=generator, dtype=torch.int16)
        words = put(words, codes, bits, torch.tensor([start]))
        expected[:, :, start : start + run] = codes
    assert torch.equal(unpack(words, bits), expected)


def test_leading_dimensions_are_free():
    words = noise(6, 2, 3, 4)
    flat = unpack(words, 3)
    assert torch.equal(unpack(words.unflatten(0, (2, 3)), 3).flatten(0, 1), flat)
    assert torch.equal(unpack(words[4, 1], 3), flat[4, 1])


def test_non_contiguous_codes():
    codes = torch.randint(0, 4, (1, PAGE_TOKENS, 5, 2), dtype=torch.int16).permute(0, 3, 1, 2)
    assert not codes.is_contiguous()
    words = put(noise(1, 2, 2, 5), codes, 2, torch.tensor([0]))
    assert torch.equal(unpack(words, 2), codes)
