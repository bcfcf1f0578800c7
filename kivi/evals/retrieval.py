"""Passkey recall: a number hidden in the prompt, asked for through the quantized cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kivi.evals.feeding import (
    MakeCache,
    Model,
    OnWork,
    Prefix,
    check_context,
    exact_prefix,
    feed,
    ignore,
    start_cache,
    work,
)
from kivi.evals.intervals import Interval, wilson
from kivi.evals.passkey import PasskeySample


@dataclass(frozen=True, eq=False)
class PasskeyPrompts:
    """Samples of one length after the exact prefill of all but their questions.

    Args:
        samples: B samples.
        prefix: the contexts, which every scheme loads.
        questions: `[B, Q]`, fed through the cache.
        answers: `[B, A]`, compared with greedy decoding.
    """

    samples: tuple[PasskeySample, ...]
    prefix: Prefix
    questions: Tensor
    answers: Tensor


@dataclass(frozen=True)
class RecallCell:
    """Recall at one length and depth: the share of keys with every digit right."""

    length: int
    depth: float
    correct: int
    total: int

    @property
    def recall(self) -> Interval:
        """Share with its Wilson interval."""
        return wilson(self.correct, self.total)


@dataclass(frozen=True)
class RecallScores:
    """Recall by length and depth."""

    cells: tuple[RecallCell, ...]

    @property
    def recall(self) -> Interval:
        """Share over all cells with its Wilson interval."""
        return wilson(sum(c.correct for c in self.cells), sum(c.total for c in self.cells))


def passkey_prompts(
    model: Model, samples: Sequence[PasskeySample], on_work: OnWork = ignore
) -> PasskeyPrompts:
    """Prefill the contexts of samples, exactly and once for all schemes.

    Raises:
        ValueError: without samples, for samples of different lengths, or beyond the model.
    """
    lengths = {sample.length for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"samples must be of one length, got lengths {sorted(lengths)}")
    check_context(model, lengths.pop(), "passkey length")
    prefix = exact_prefix(model, torch.stack([s.context_ids for s in samples]))
    on_work(work(*prefix.ids.shape))
    return PasskeyPrompts(
        tuple(samples),
        prefix,
        torch.stack([s.question_ids for s in samples]),
        torch.stack([s.answer_ids for s in samples]),
    )


@torch.inference_mode()
def recalled(
    model: Model, make_cache: MakeCache, prompts: PasskeyPrompts, on_work: OnWork = ignore
) -> list[bool]:
    """Ask for the keys through a cache: for each sample whether every greedy digit was right.

    The question goes in as one chunk, the digits one at a time, as `generate` would.
    """
    cache = start_cache(model, make_cache, prompts.prefix)
    step, said = prompts.questions, []
    for _ in range(prompts.answers.shape[1]):
        fed = step
        (logits,) = feed(model, cache, fed, fed.shape[1])
        step = logits[:, -1:].argmax(-1)
        said.append(step.cpu())
        on_work(work(*fed.shape))
    hits: list[bool] = (torch.cat(said, dim=1) == prompts.answers).all(-1).tolist()
    return hits


def tally(results: Sequence[tuple[Sequence[PasskeySample], Sequence[bool]]]) -> RecallScores:
    """Count answers by length and depth.

    Raises:
        ValueError: without results.
    """
    if not results:
        raise ValueError("results is empty; no passkey was asked for")
    counts: dict[tuple[int, float], list[bool]] = defaultdict(list)
    for samples, hits in results:
        for sample, hit in zip(samples, hits, strict=True):
            counts[sample.length, sample.depth].append(hit)
    return RecallScores(
        tuple(RecallCell(*key, sum(found), len(found)) for key, found in sorted(counts.items()))
    )
