"""Pages of one layer: the pool that stores them, and on the host which rows refer to which."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from kivi.quantize import Pages, empty_pages
from kivi.spec import PAGE_TOKENS, KVSpec


class CacheBytes(NamedTuple):
    """Bytes `allocated` (a shared pool counted whole) and of these `used` by the tokens held."""

    allocated: int
    used: int


class PagePool:
    """Pages of keys and values under one numbering, shared by rows and by forked caches.

    Page 0 is a bin: masked writes land there. A page that several rows refer to is never written.

    Args:
        spec: how the layer is packed.
        num_kv_heads: Hkv.
        head_dim: D of the keys.
        value_head_dim: D of the values.
        dtype: the model's dtype.
        device: where the pages live.
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
        pages: int = 0,
    ) -> None:
        self.key = empty_pages(spec.key, pages + 1, num_kv_heads, head_dim, dtype, device)
        self.value = empty_pages(spec.value, pages + 1, num_kv_heads, value_head_dim, dtype, device)
        self.references = [1] + [0] * pages
        # Pages that caches with a max_length may need at once, if they share nothing.
        self.promised = 0

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page of keys and values."""
        return self.nbytes // len(self.references)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free ones and the bin included."""
        return self.key.nbytes + self.value.nbytes

    def take(self, count: int) -> list[int]:
        """Take pages that nobody refers to; the pool grows where there are too few."""
        free = [p for p, n in enumerate(self.references) if n == 0] if count else []
        if count > len(free):
            # A quarter more at a time: copying what is there then costs O(1) per page.
            free += self.grow(max(count - len(free), len(self.references) // 4))
        for page in free[:count]:
            self.references[page] = 1
        return free[:count]

    def drop(self, pages: list[int]) -> None:
        """Give up one reference to each page."""
        for page in pages:
            self.references[page] -= 1

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copy the contents of pages."""
        tensors = [t for t in (*self.key, *self.value) if t is not None] if source else []
        # All are read before one is written: a page may be both, and memory may run out between.
        for tensor, new in [(t, t[source]) for t in tensors]:
            tensor[target] = new

    @torch.inference_mode(False)
    def grow(self, count: int) -> list[int]:
        """Add `count` pages and return them."""
        old = len(self.references)

        def grown(pages: Pages) -> Pages:
            def more(t: torch.Tensor) -> torch.Tensor:
                return torch.cat([t, t.new_zeros(count, *t.shape[1:])])

            words, *others = pages
            return Pages(more(words), *(None if t is None else more(t) for t in others))

        key, value = grown(self.key), grown(self.value)
        self.key, self.value = key, value
        self.references += [0] * count
        return list(range(old, old + count))


class PageTable:
    """Which pages the rows of one cache refer to.

    Args:
        pool: where the pages live.
        batch_size: rows.
        columns: pages that every row owns from the start, or None to take them when needed.
    """

    def __init__(self, pool: PagePool, batch_size: int, columns: int | None) -> None:
        self.pool, self.columns = pool, columns
        self.rows = [pool.take(columns or 0) for _ in range(batch_size)]
        pool.promised += batch_size * (columns or 0)

    def __del__(self) -> None:
        for row in getattr(self, "rows", []):
            self.pool.drop(row)
            self.pool.promised -= self.columns or 0

    def reserve(self, tokens: list[int]) -> bool:
        """Make room for so many packed tokens in each row; whether a page was added."""
        missing = [max(0, page_count(n) - len(r)) for n, r in zip(tokens, self.rows, strict=True)]
        taken = self.pool.take(sum(missing))
        for row, count in zip(self.rows, missing, strict=True):
            row += [taken.pop(0) for _ in range(count)]
        return any(missing)

    def rebuild(self, sources: list[int], tokens: list[int], fork: bool = False) -> PageTable:
        """Rows that continue old rows.

        Full pages are shared. A page that will still be written is kept by one row that owned it
        alone, and copied for the others.

        Args:
            sources: the old row that each new row continues.
            tokens: packed tokens that each new row keeps of it.
            fork: keep the old rows too, and return the new ones in a table of their own.

        Returns:
            This table, or the new one if `fork`.
        """
        pool = self.pool
        # What has static addresses must never move later: room for all of it is made here.
        promised = pool.promised + (len(sources) - (not fork) * len(self.rows)) * (
            self.columns or 0
        )
        if promised >= len(pool.references):
            pool.grow(promised + 1 - len(pool.references))
        references = list(pool.references)
        rows, wanted, claimed = [], [], set()
        for r, n in zip(sources, tokens, strict=True):
            row = self.rows[r][: n // PAGE_TOKENS]
            for page in row:
                references[page] += 1
            rows.append(row)
        for row, r, n in zip(rows, sources, tokens, strict=True):
            for column in range(len(row), self.columns or page_count(n)):
                page = self.rows[r][column]
                if not fork and references[page] == 1 and page not in claimed:
                    claimed.add(page)
                    row.append(page)
                else:
                    wanted.append((row, len(row), page, column * PAGE_TOKENS < n))
                    row.append(-1)
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
        return table

    def tensor(self, device: torch.device) -> torch.Tensor:
        """`[B, n]` int64, padded with page 0."""
        width = max(map(len, self.rows))
        padded = [row + [0] * (width - len(row)) for row in self.rows]
        return torch.tensor(padded, dtype=torch.int64, device=device).view(len(self.rows), width)


def page_count(tokens: int) -> int:
    """Pages that hold so many packed tokens."""
    return -(-tokens // PAGE_TOKENS)
