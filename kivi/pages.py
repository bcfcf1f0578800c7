"""Pages of one layer: the pool that stores them, and on the host which rows refer to which."""

from __future__ import annotations

import copy
import sys
from typing import NamedTuple

import torch

from kivi.quantize import Pages, new_pages, zero
from kivi.room import Buffers, Part, Room
from kivi.spec import PAGE_TOKENS, KVSpec

CROP = 128
"""Tokens that can always be cropped, whatever a sliding window has passed."""


class CacheBytes(NamedTuple):
    """Bytes `allocated` (a shared pool counted whole) and of these `used` by the tokens held."""

    allocated: int
    used: int


class PagePool(Part):
    """Pages of keys and values under one numbering, shared by rows and by forked caches.

    Page 0 is a bin: masked writes land there. A page that several rows refer to is never written.

    Args:
        spec: how the layer is packed.
        num_kv_heads: Hkv.
        head_dim: D of the keys.
        value_head_dim: D of the values.
        dtype: the model's dtype.
        device: where the pages live.
        room: where their memory comes from.
        pages: pages allocated at first.
    """

    def __init__(
        self,
        spec: KVSpec,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        room: Room,
        pages: int = 0,
    ) -> None:
        shape, where = (num_kv_heads, head_dim, value_head_dim), (dtype, device)
        self._format, self._room = (spec, shape, where), room
        self._made: tuple[Pages, Pages] | None = None
        self.references = [1] + [0] * pages
        # Pages that caches with a max_length may need at once, if they share nothing.
        self.promised = 0

    def pages(self) -> tuple[Pages, Pages]:
        """Pages of keys and of values, allocated late: those of a prompt all at once."""
        if self._made is None:
            self._made = self._make(len(self.references))
        return self._made

    def _make(self, count: int) -> tuple[Pages, Pages]:
        spec, (heads, d, dv), where = self._format

        def make(layers: int) -> Buffers:
            key = new_pages(spec.key, layers * count, heads, d, *where)
            value = new_pages(spec.value, layers * count, heads, dv, *where)
            zero((*key, *value))
            return [*key, *value]

        made = self._room.take("pages", (count, self._format[1:]), make)
        return Pages(*made[:5]), Pages(*made[5:])

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page of keys and values."""
        return self.nbytes // len(self.references)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages there are yet, free ones and the bin included."""
        return sum(pages.nbytes for pages in self._made or ())

    def take(self, count: int) -> list[int]:
        """Take pages that nobody refers to; the pool grows where there are too few."""
        free = [p for p, n in enumerate(self.references) if n == 0] if count else []
        if count > len(free):
            # A quarter more at a time: copying what is there then costs O(1) per page.
            free += self.grow(max(count - len(free), len(self.references) // 4))
        free = free[:count]
        for page in free:
            self.references[page] = 1
        return free

    def drop(self, pages: list[int]) -> None:
        """Give up one reference to each page."""
        for page in pages:
            self.references[page] -= 1

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copy the contents of pages."""
        tensors = [t for pages in self.pages() for t in pages if t is not None] if source else []
        # All are read before one is written: a page may be both, and memory may run out between.
        for tensor, new in [(t, t[source]) for t in tensors]:
            tensor[target] = new

    def grow(self, count: int) -> list[int]:
        """Add `count` pages and return them."""
        old, made = len(self.references), self._made
        if made is None:
            self._made = self._make(old + count)
        else:
            self._made = _grown(made[0], count), _grown(made[1], count)
        self.references += [0] * count
        return list(range(old, old + count))


@torch.inference_mode(False)
def _grown(pages: Pages, count: int) -> Pages:
    """Pages with `count` more of them."""

    def more(t: torch.Tensor) -> torch.Tensor:
        new = t.new_zeros(len(t) + count, *t.shape[1:])
        new[: len(t)] = t
        return new

    words, *others = pages
    return Pages(more(words), *(None if t is None else more(t) for t in others))


class PageTable:
    """Which pages the rows of one cache refer to.

    Column c of a row is its page `c mod ring`: under a sliding window pages come round, and the
    table's oldest columns show newer tokens, which no query looks at.

    Args:
        spec: how the layer is packed.
        batch_size: rows.
        num_kv_heads: Hkv.
        head_dims: D of the keys and of the values.
        dtype: the model's dtype.
        device: where the pages live.
        max_length: tokens of a row, for which every row owns its pages from the start; None to
            take pages when needed.
        window: the longest window that queries have; None to keep all tokens.
        room: where memory comes from.
    """

    def __init__(
        self,
        spec: KVSpec,
        batch_size: int,
        num_kv_heads: int,
        head_dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        max_length: int | None,
        window: int | None,
        room: Room,
    ) -> None:
        self.columns, ring = None, None if window is None else ring_pages(spec, window)
        if max_length is not None:
            exact = spec.sink_length + spec.residual_length
            self.columns = max(1, page_count(max_length - exact))
            ring = None if ring is None or ring >= self.columns else ring
        self.rounds = ring is not None
        self.ring = ring or sys.maxsize
        self.owned = min(self.columns or 0, self.ring)
        count = batch_size * self.owned
        self.pool = PagePool(spec, num_kv_heads, *head_dims, dtype, device, room, count)
        self.rows = [self.pool.take(self.owned) for _ in range(batch_size)]
        self.opened, self.lost = [self.columns or 0] * batch_size, [0] * batch_size
        self.pool.promised += count

    def __del__(self) -> None:
        for row in getattr(self, "rows", []):
            self.pool.drop(row)
            self.pool.promised -= self.owned

    def reserve(self, tokens: list[int]) -> bool:
        """Make room for so many packed tokens in each row; whether the table changed."""
        opened = [page_count(n) for n in tokens]
        if self.columns is not None or opened == self.opened:
            return False
        shared = self._shared(opened) if self.rounds else []
        lacking = [
            max(0, min(n, self.ring) - len(r)) for n, r in zip(opened, self.rows, strict=True)
        ]
        taken = self.pool.take(len(shared) + sum(lacking))
        if shared:
            # Until the step has attended, the page's old tokens are still looked at.
            try:
                self.pool.copy([row[i] for row, i in shared], taken[: len(shared)])
            except BaseException:
                self.pool.drop(taken)
                raise
            for row, i in shared:
                self.pool.drop(row[i : i + 1])
                row[i] = taken.pop(0)
        for row, count in zip(self.rows, lacking, strict=True):
            row += taken[:count]
            del taken[:count]
        self.opened = opened
        return True

    def _shared(self, opened: list[int]) -> list[tuple[list[int], int]]:
        """Pages that come round but are shared by now: the others keep them."""
        references, found = list(self.pool.references), []
        for row, old, new in zip(self.rows, self.opened, opened, strict=True):
            for i in sorted({c % self.ring for c in range(max(old, new - self.ring), new)}):
                if i < len(row) and references[row[i]] > 1:
                    references[row[i]] -= 1
                    found.append((row, i))
        return found

    def forgotten(self, packed: list[int]) -> list[int]:
        """Tokens at the start of rows with so many packed ones whose pages hold later ones now."""
        pairs = zip(self.lost, packed, strict=True)
        return [max(n, (page_count(p) - self.ring) * PAGE_TOKENS) for n, p in pairs]

    def used(self, packed: list[int]) -> tuple[list[int], list[list[int]]]:
        """The pages of rows with so many packed tokens, each once, and each row in places of it."""
        rows = [row[: page_count(n)] for row, n in zip(self.rows, packed, strict=True)]
        pages = sorted({page for row in rows for page in row})
        place = {page: i for i, page in enumerate(pages)}
        return pages, [[place[page] for page in row] for row in rows]

    def used_nbytes(self, packed: list[int]) -> int:
        """Bytes of the pages that rows with so many packed tokens refer to."""
        return len(self.used(packed)[0]) * self.pool.page_nbytes

    def refill(self, rows: list[list[int]], packed: list[int], lost: list[int]) -> None:
        """Give the rows of an empty table pages: what `used` said, and `forgotten`.

        A row that owns its pages has the first of them filled; else pages are shared as they were.
        """
        if self.columns is None:
            count = 1 + max((i for row in rows for i in row), default=-1)
            taken = self.pool.take(count)
            self.rows = [[taken[i] for i in row] for row in rows]
            for page in taken:
                self.pool.references[page] = sum(row.count(page) for row in self.rows)
            self.opened = [page_count(n) for n in packed]
        self.lost = list(lost)

    def rebuild(
        self, packed: list[int], sources: list[int], tokens: list[int], fork: bool = False
    ) -> PageTable:
        """Rows that continue old rows.

        Full pages are shared. A page that will still be written is kept by one row that owned it
        alone, and copied for the others.

        Args:
            packed: packed tokens of the old rows.
            sources: the old row that each new row continues.
            tokens: packed tokens that each new row keeps of it.
            fork: keep the old rows too, and return the new ones in a table of their own.

        Returns:
            This table, or the new one if `fork`.
        """
        pool = self.pool
        # What has static addresses must never move later: room for all of it is made here.
        promised = pool.promised + (len(sources) - (not fork) * len(self.rows)) * self.owned
        if promised >= len(pool.references):
            pool.grow(promised + 1 - len(pool.references))
        lost = [self.forgotten(packed)[r] if n else 0 for r, n in zip(sources, tokens, strict=True)]
        references = list(pool.references)
        rows, wanted, claimed = [], [], set()
        for r, n in zip(sources, tokens, strict=True):
            kept = self.rows[r][: self.owned or page_count(n)]
            row = [page if self._stays(i, n) else -1 for i, page in enumerate(kept)]
            for page in row:
                references[page] += page >= 0
            rows.append(row)
        for row, r, n in zip(rows, sources, tokens, strict=True):
            for i in [i for i, page in enumerate(row) if page < 0]:
                page = self.rows[r][i]
                if not fork and references[page] == 1 and page not in claimed:
                    claimed.add(page)
                    row[i] = page
                else:
                    wanted.append((row, i, page, i < page_count(n)))
        if not fork:
            for page in (p for row in self.rows for p in row if p not in claimed):
                references[page] -= 1
        free = [p for p in range(len(references) - 1, 0, -1) if references[p] == 0]
        if len(wanted) > len(free):
            free = pool.grow(max(len(wanted) - len(free), len(references) // 4)) + free
            references += [0] * (len(pool.references) - len(references))
        copies = []
        for row, i, page, written in wanted:
            row[i] = free.pop()
            references[row[i]] = 1
            if written:
                copies.append((page, row[i]))
        pool.copy([a for a, _ in copies], [b for _, b in copies])
        pool.references[:] = references
        pool.promised = promised
        table = copy.copy(self) if fork else self
        table.rows = rows
        table.opened = [self.columns or page_count(n) for n in tokens]
        table.lost = lost
        return table

    def _stays(self, i: int, tokens: int) -> bool:
        """Whether a row of so many packed tokens leaves its page i as it is."""
        full = tokens // PAGE_TOKENS
        if self.columns is None:  # `reserve` looks again before a page comes round
            return tokens % PAGE_TOKENS == 0 or i != full % self.ring
        return not self.rounds and i < full

    def padded(self) -> list[list[int]]:
        """The pages of each row in their columns, padded with page 0 to the same number."""
        width, pairs = max(self.opened), zip(self.rows, self.opened, strict=True)
        return [[r[c % self.ring] for c in range(n)] + [0] * (width - n) for r, n in pairs]


@torch.inference_mode(False)  # layers keep it
def table_of(padded: list[list[int]], device: torch.device) -> torch.Tensor:
    """What `PageTable.padded` gives as `[B, n]` int64 on a device."""
    table = torch.tensor(padded, dtype=torch.int64).view(len(padded), len(padded[0]))
    # Else the host would wait for the GPU here, in every layer of a prompt, and then the GPU
    # for the host. CUDA has read pageable memory when the call returns.
    return table.to(device, non_blocking=True)


def page_count(tokens: int) -> int:
    """Pages that hold so many packed tokens."""
    return -(-tokens // PAGE_TOKENS)


def ring_pages(spec: KVSpec, window: int) -> int:
    """Pages in which a row finds all packed tokens that a query with this window sees.

    That holds after a crop of up to `CROP` tokens as well, wherever a page begins.
    """
    reach = window - 1 + CROP - spec.residual_length
    return page_count(max(0, reach - 1)) + 1
