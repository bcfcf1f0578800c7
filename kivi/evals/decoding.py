"""Perplexity, logit KL and top-1 agreement while decoding through a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.evals.feeding import (
    CacheSize,
    MakeCache,
    Model,
    OnWork,
    Prefix,
    cache_size,
    check_chunk,
    check_context,
    exact_logits,
    exact_prefix,
    feed,
    ignore,
    start_cache,
    work,
)
from kivi.evals.intervals import Interval, block_bootstrap, p999


@dataclass(frozen=True, eq=False)
class Reference:
    """What full precision says about a batch of texts: computed once, compared with every scheme.

    Args:
        prefix: the prompts, `prefill` tokens each.
        ids: `[B, N]` the tokens fed after them.
        targets: `[B, N]` the token that follows each.
        logits: `[B, N, V]` in the dtype the model gave them, so that nothing is rounded twice.
    """

    prefix: Prefix
    ids: Tensor
    targets: Tensor
    logits: Tensor

    def nll(self) -> Tensor:
        """Negative log-likelihood `[B, N]` of the targets in full precision, nats."""
        pieces = zip(self.logits.split(64, dim=1), self.targets.split(64, dim=1), strict=True)
        return torch.cat([_nll(x.float().log_softmax(-1), t) for x, t in pieces], dim=1).cpu()


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of each evaluated token, `[S, N]` for N tokens of S texts, and the cache's size.

    Args:
        nll: negative log-likelihood of the text's next token, nats.
        kl: KL(full precision || scheme) of the next-token distribution, nats.
        top1: whether both put the same token first.
        size: of the cache of one batch after its last token.
    """

    nll: Tensor
    kl: Tensor
    top1: Tensor
    size: CacheSize


@dataclass(frozen=True)
class DecodeScores:
    """Summary of TokenScores, with 95 % intervals by block bootstrap."""

    perplexity: Interval
    kl_mean: Interval
    kl_p999: Interval
    top1: Interval
    tokens: int
    size: CacheSize


def reference(model: Model, texts: Tensor, *, prefill: int, on_work: OnWork = ignore) -> Reference:
    """Run texts in full precision.

    Args:
        model: a causal language model.
        texts: `[B, T]`; the first `prefill` tokens are the prompt, each later token but the last
            is fed, and every token after the first fed one is a target.
        prefill: P, tokens of the prompt.
        on_work: told how much work was done since its last call.

    Raises:
        ValueError: if nothing is left to evaluate or the model has too few positions.
    """
    if prefill < 1 or texts.ndim != 2 or texts.shape[1] < prefill + 2:
        raise ValueError(
            f"texts of shape {tuple(texts.shape)} leave nothing to evaluate after "
            f"prefill={prefill}; need [B, T] with T >= prefill + 2, prefill >= 1"
        )
    check_context(model, texts.shape[1] - 1)
    prefix = exact_prefix(model, texts[:, :prefill])
    ids, targets = texts[:, prefill:-1], texts[:, prefill + 1 :].to(model.device)
    on_work(work(*prefix.ids.shape))
    return Reference(prefix, ids, targets, exact_logits(model, prefix, ids, on_work))


@torch.inference_mode()
def compare(
    model: Model,
    make_cache: MakeCache,
    exact: Reference,
    *,
    chunk: int = 32,
    on_work: OnWork = ignore,
) -> TokenScores:
    """Feed a batch through a cache and compare every next-token distribution with the exact one.

    Args:
        model: the model of the reference.
        make_cache: makes an empty cache.
        exact: the batch in full precision.
        chunk: tokens fed at a time; 1 is decoding as `generate` does it.
        on_work: told how much work was done since its last call.

    Raises:
        ValueError: for a chunk below 1.
    """
    check_chunk(chunk)
    cache = start_cache(model, make_cache, exact.prefix)
    scores: list[tuple[Tensor, ...]] = []
    pieces = (exact.logits.split(chunk, dim=1), exact.targets.split(chunk, dim=1))
    steps = zip(feed(model, cache, exact.ids, chunk), *pieces, strict=True)
    for logits, exact_piece, targets in steps:
        scores.append(_compare_chunk(logits, exact_piece, targets))
        on_work(work(*targets.shape))
    nll, kl, top1 = (torch.cat(series, dim=1).cpu() for series in zip(*scores, strict=True))
    return TokenScores(nll, kl, top1, cache_size(cache))


def _compare_chunk(logits: Tensor, exact: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """nll, kl and top1 `[B, n]` of logits `[B, n, V]` for both."""
    log_q, log_p = logits.float().log_softmax(-1), exact.float().log_softmax(-1)
    top1 = log_q.argmax(-1) == log_p.argmax(-1)
    kl = (log_p.exp() * log_p.sub_(log_q)).sum(-1)
    return _nll(log_q, targets), kl, top1


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """`[B, n]` of log-probabilities `[B, n, V]` and targets `[B, n]`."""
    return -log_probs.gather(-1, targets[..., None]).squeeze(-1)


def summarize(batches: list[TokenScores], *, seed: int = 0) -> DecodeScores:
    """Summary over batches of texts of one length; the size is that of the first batch.

    Raises:
        ValueError: without batches.
    """
    if not batches:
        raise ValueError("batches is empty; nothing was evaluated")
    nll, kl, top1 = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("nll", "kl", "top1")
    )
    return DecodeScores(
        perplexity=block_bootstrap(nll, seed=seed).exp(),
        kl_mean=block_bootstrap(kl, seed=seed),
        kl_p999=block_bootstrap(kl, p999, seed=seed),
        top1=block_bootstrap(top1, seed=seed),
        tokens=nll.numel(),
        size=batches[0].size,
    )
