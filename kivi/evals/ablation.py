"""One text, one model, many schemes: every metric for every scheme, full precision run once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kivi.evals.attention_error import (
    AttentionInputs,
    MakeLayer,
    attention_errors,
)
from kivi.evals.decoding import (
    DecodeScores,
    Reference,
    TokenScores,
    compare,
    reference,
    summarize,
)
from kivi.evals.feeding import EXACT_CHUNK, MakeCache, Model, check_chunk, work, work_in_chunks
from kivi.evals.intervals import Interval, block_bootstrap
from kivi.evals.passkey import DIGITS, PasskeySample
from kivi.evals.retrieval import (
    PasskeyPrompts,
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


class Failure(NamedTuple):
    """A scheme that raised while it was evaluated, and what."""

    label: str
    error: str


@dataclass(frozen=True)
class Ablation:
    """Full precision's perplexity and the scores of schemes, all over the same texts.

    Args:
        exact_perplexity: in full precision.
        schemes: scores, in the order of the candidates.
        failed: schemes that raised; nothing of theirs is among the scores.
        complete: whether the whole task was run. If not, the scores are over the batches that every
            scheme shown has finished, and a scheme that has finished none is not shown.
    """

    exact_perplexity: Interval
    schemes: tuple[SchemeScores, ...]
    failed: tuple[Failure, ...] = ()
    complete: bool = True


def ablate(
    model: Model,
    candidates: Sequence[Candidate],
    task: Task,
    on_progress: OnProgress = lambda stage, amount: None,
    *,
    on_failure: Callable[[Failure], None] = lambda failure: None,
    on_result: Callable[[Ablation], None] = lambda ablation: None,
) -> Ablation:
    """Run every scheme on a task. Batches are the outer loop, so one exact batch is held at a time.

    A scheme that raises an Exception is left out of what remains; what full precision raises is
    passed on.

    Args:
        model: a causal language model.
        candidates: the schemes.
        task: what they are tested on.
        on_progress: told what is being run and how much of `task.work` was done.
        on_failure: told of a scheme that raised, at once.
        on_result: given what is known so far whenever a scheme is through with a batch, as soon as
            there is a scheme to show.

    Returns:
        The scores; without any scheme if all failed.

    Raises:
        ValueError: without candidates, for labels that repeat, or a task the model can't take.
    """
    labels = [c.label for c in candidates]
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"candidates: labels must be unique and at least one, got {labels}")
    run = _Run(model, task, on_progress, on_failure, on_result, [_Found(c) for c in candidates])
    for texts in task.texts.split(task.batch_size):
        run.decode(texts)
    for samples in task.passkeys:
        run.ask(samples)
    if task.attention:
        run.attend()
    return run.ablation(complete=True)


@dataclass(eq=False)
class _Found:
    """What is known of a scheme, batch by batch."""

    candidate: Candidate
    tokens: list[TokenScores] = field(default_factory=list)
    answers: list[tuple[Sequence[PasskeySample], list[bool]]] = field(default_factory=list)
    attention: tuple[float, ...] | None = None
    summaries: dict[int, DecodeScores] = field(default_factory=dict)
    """By batches; the bootstrap is too slow to repeat it for every scheme that finishes."""

    def scores(self, texts: int, asked: int, seed: int) -> SchemeScores:
        """Scores over the first batches of texts and of passkeys."""
        if texts not in self.summaries:
            self.summaries[texts] = summarize(self.tokens[:texts], seed=seed)
        recall = tally(self.answers[:asked]) if self.answers else None
        return SchemeScores(self.candidate.label, self.summaries[texts], recall, self.attention)


@dataclass(eq=False)
class _Run:
    """An ablation under way: the schemes that have not failed, and those that have."""

    model: Model
    task: Task
    on_progress: OnProgress
    on_failure: Callable[[Failure], None]
    on_result: Callable[[Ablation], None]
    live: list[_Found]
    failed: list[Failure] = field(default_factory=list)
    exact_nll: list[Tensor] = field(default_factory=list)

    def decode(self, texts: Tensor) -> None:
        """Compare every scheme with full precision on a batch of texts."""
        if not self.live:
            return
        tell = partial(self.on_progress, EXACT)
        exact = reference(self.model, texts, prefill=self.task.prefill, on_work=tell)
        self.exact_nll.append(exact.nll())
        self._each(partial(self._decode, exact))

    def ask(self, samples: Sequence[PasskeySample]) -> None:
        """Ask every scheme for a batch of passkeys."""
        if not self.live:
            return
        prompts = passkey_prompts(self.model, samples, partial(self.on_progress, EXACT))
        self._each(partial(self._ask, prompts))

    def attend(self) -> None:
        """Compare the attention of every scheme that makes layers."""
        self._each(self._attend)

    def ablation(self, *, complete: bool) -> Ablation:
        """What is known so far, over what all schemes have finished that have finished anything."""
        texts = _common((len(found.tokens) for found in self.live), len(self.exact_nll))
        asked = _common((len(found.answers) for found in self.live), 0)
        seed = self.task.seed
        return Ablation(
            block_bootstrap(torch.cat(self.exact_nll[:texts]), seed=seed).exp(),
            tuple(found.scores(texts, asked, seed) for found in self.live if found.tokens),
            tuple(self.failed),
            complete,
        )

    def _each(self, evaluate: Callable[[_Found], None]) -> None:
        for found in list(self.live):
            error = _error_of(partial(evaluate, found))
            if error is not None:
                self.live.remove(found)
                self.failed.append(Failure(found.candidate.label, error))
                self.on_failure(self.failed[-1])
            if any(other.tokens for other in self.live):
                self.on_result(self.ablation(complete=False))

    def _decode(self, exact: Reference, found: _Found) -> None:
        tell = partial(self.on_progress, found.candidate.label)
        make, chunk = found.candidate.make_cache, self.task.chunk
        found.tokens.append(compare(self.model, make, exact, chunk=chunk, on_work=tell))

    def _ask(self, prompts: PasskeyPrompts, found: _Found) -> None:
        tell = partial(self.on_progress, found.candidate.label)
        hits = recalled(self.model, found.candidate.make_cache, prompts, tell)
        found.answers.append((prompts.samples, hits))

    def _attend(self, found: _Found) -> None:
        make, task = found.candidate.make_layer, self.task
        if make:
            found.attention = attention_errors(
                task.attention, make, prefill=task.prefill, chunk=task.chunk
            )


def _common(finished: Iterable[int], otherwise: int) -> int:
    """Batches that all have finished that have finished any."""
    return min((n for n in finished if n), default=otherwise)


def _error_of(evaluate: Callable[[], None]) -> str | None:
    """What a call raised, in words: the exception itself would hold its frames' caches."""
    try:
        evaluate()
        return None
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    gc.collect()  # frames that hold each other in a cycle
    return words
