"""One text, one model, many schemes: every metric for every scheme, full precision run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kivi.evals.attention_error import (
    AttentionInputs,
    MakeLayer,
    attention_errors,
)
from kivi.evals.decoding import DecodeScores, TokenScores, compare, reference, summarize
from kivi.evals.feeding import EXACT_CHUNK, MakeCache, Model, check_chunk, work, work_in_chunks
from kivi.evals.intervals import Interval, block_bootstrap
from kivi.evals.passkey import DIGITS, PasskeySample
from kivi.evals.retrieval import (
    RecallScores,
    passkey_prompts,
    recalled,
    tally,
)

OnProgress = Callable[[str, int], None]
"""Told what is being run and how much work was done since the last call."""
EXACT = "full precision"


@dataclass(frozen=True)
class Candidate:
    """A scheme under test.

    Args:
        label: what reports call it, unique in a run.
        make_cache: makes an empty cache for the model.
        make_layer: makes an empty cache for one layer, or None to leave out attention errors.
    """

    label: str
    make_cache: MakeCache
    make_layer: MakeLayer | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What every scheme is tested on.

    Args:
        texts: `[S, T]`; see `kivi.evals.decoding.reference`.
        prefill: P, tokens of a text that are stored at once before decoding.
        chunk: tokens fed at a time.
        batch_size: texts at a time; the bytes reported are those of one such batch.
        seed: of the bootstrap.
        passkeys: batches of samples, each of one length; none leaves the metric out.
        attention: of `record_attention` over texts as long as these; none leaves the metric out.
    """

    texts: Tensor
    prefill: int
    chunk: int = 32
    batch_size: int = 8
    seed: int = 0
    passkeys: tuple[tuple[PasskeySample, ...], ...] = ()
    attention: tuple[AttentionInputs, ...] = ()

    def __post_init__(self) -> None:
        check_chunk(self.chunk)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is not allowed; it must be at least 1")

    def work(self, candidates: int) -> int:
        """All the work of an ablation, in the units that progress is told in."""
        total = 0
        for batch in self.texts.split(self.batch_size):
            rows, fed = batch.shape[0], batch.shape[1] - 1 - self.prefill
            total += work(rows, self.prefill) + work_in_chunks(rows, fed, EXACT_CHUNK)
            total += candidates * work_in_chunks(rows, fed, self.chunk)
        for samples in self.passkeys:
            rows, question = len(samples), samples[0].question_length
            total += work(rows, samples[0].length - question - DIGITS)
            total += candidates * (work(rows, question) + (DIGITS - 1) * work(rows, 1))
        return total


@dataclass(frozen=True)
class SchemeScores:
    """All scores of one scheme; None where a metric was left out."""

    label: str
    decode: DecodeScores
    recall: RecallScores | None
    attention: tuple[float, ...] | None


@dataclass(frozen=True)
class Ablation:
    """Scores of all schemes, in the order of the candidates, and full precision's perplexity."""

    exact_perplexity: Interval
    schemes: tuple[SchemeScores, ...]


def ablate(
    model: Model,
    candidates: Sequence[Candidate],
    task: Task,
    on_progress: OnProgress = lambda stage, amount: None,
) -> Ablation:
    """Run every scheme on a task. Batches are the outer loop, so one exact batch is held at a time.

    Raises:
        ValueError: without candidates, for labels that repeat, or a task the model can't take.
    """
    labels = [c.label for c in candidates]
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"candidates: labels must be unique and at least one, got {labels}")
    exact_nll, tokens = _decode(model, candidates, task, on_progress)
    answers = _ask(model, candidates, task, on_progress)
    schemes = []
    for i, candidate in enumerate(candidates):
        attention = None
        if task.attention and candidate.make_layer:
            attention = attention_errors(
                task.attention, candidate.make_layer, prefill=task.prefill, chunk=task.chunk
            )
        recall = tally(answers[i]) if answers[i] else None
        decode = summarize(tokens[i], seed=task.seed)
        schemes.append(SchemeScores(candidate.label, decode, recall, attention))
    perplexity = block_bootstrap(exact_nll, seed=task.seed).exp()
    return Ablation(perplexity, tuple(schemes))


def _decode(
    model: Model, candidates: Sequence[Candidate], task: Task, on_progress: OnProgress
) -> tuple[Tensor, list[list[TokenScores]]]:
    """NLL `[S, N]` in full precision, and for each candidate its scores of each batch."""
    exact_nll: list[Tensor] = []
    scores: list[list[TokenScores]] = [[] for _ in candidates]
    for texts in task.texts.split(task.batch_size):
        exact = reference(model, texts, prefill=task.prefill, on_work=partial(on_progress, EXACT))
        exact_nll.append(exact.nll())
        for candidate, own in zip(candidates, scores, strict=True):
            tell = partial(on_progress, candidate.label)
            own.append(compare(model, candidate.make_cache, exact, chunk=task.chunk, on_work=tell))
    return torch.cat(exact_nll), scores


def _ask(
    model: Model, candidates: Sequence[Candidate], task: Task, on_progress: OnProgress
) -> list[list[tuple[Sequence[PasskeySample], list[bool]]]]:
    """For each candidate the samples and its hits."""
    answers: list[list[tuple[Sequence[PasskeySample], list[bool]]]] = [[] for _ in candidates]
    for samples in task.passkeys:
        prompts = passkey_prompts(model, samples, partial(on_progress, EXACT))
        for candidate, own in zip(candidates, answers, strict=True):
            tell = partial(on_progress, candidate.label)
            own.append((samples, recalled(model, candidate.make_cache, prompts, tell)))
    return answers
