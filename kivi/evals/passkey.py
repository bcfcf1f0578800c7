"""Passkey retrieval: a five-digit number hidden in real text, and the question that asks for it.

Training and evaluation build their prompts here, so that they cannot drift apart. A prompt is

    bos, text, "# Remember: the pass key for amber is 48213.", text,
    "# Answer: the pass key for amber is "

and the answer is the five digit tokens. An evaluation prefills `PasskeySample.context_ids` and
feeds `PasskeySample.question_ids` and the answer through the cache under test.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 5
NAMES = tuple(
    """
    amber array block cache chain class client color cycle delta event field frame graph
    green group image index layer level light model motor music night order paper phase
    point queue range red river scale scope server shape sigma space state stone table tower
    train tree value water wheel white window world yellow zone
    """.split()  # noqa: SIM905 - a list of fifty literals reads worse
)


@dataclass(frozen=True)
class PasskeyTemplate:
    """The fixed parts of a prompt as token ids, the same number of tokens for every name."""

    bos: int
    digits: tuple[int, ...]
    needles: dict[str, tuple[int, ...]]  # name -> tokens in front of the digits
    needle_end: tuple[int, ...]
    questions: dict[str, tuple[int, ...]]

    @classmethod
    def from_encode(cls, encode: Callable[[str], Sequence[int]], bos: int) -> PasskeyTemplate:
        """Encode the parts; `encode` must add no special tokens and keep every digit single."""
        digits = [tuple(encode(str(d))) for d in range(10)]
        if any(len(ids) != 1 for ids in digits) or len(set(digits)) != 10:
            raise ValueError(f"encode must make each digit one token of its own, got {digits}")
        needles = {n: tuple(encode(f"\n# Remember: the pass key for {n} is ")) for n in NAMES}
        questions = {n: tuple(encode(f"\n# Answer: the pass key for {n} is ")) for n in NAMES}
        sizes = {n: (len(needles[n]), len(questions[n])) for n in NAMES}
        common = Counter(sizes.values()).most_common(1)[0][0]
        names = [n for n in NAMES if sizes[n] == common]
        return cls(
            bos=bos,
            digits=tuple(ids[0] for ids in digits),
            needles={n: needles[n] for n in names},
            needle_end=tuple(encode(".\n")),
            questions={n: questions[n] for n in names},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names a key can have: those whose needle and question have the usual size."""
        return tuple(self.questions)

    @property
    def question_length(self) -> int:
        """Tokens of a question."""
        return len(next(iter(self.questions.values())))

    @property
    def needle_length(self) -> int:
        """Tokens of a needle, its digits included."""
        return len(next(iter(self.needles.values()))) + DIGITS + len(self.needle_end)

    def min_length(self, distractors: int = 0) -> int:
        """The shortest sample: no text at all between the needles."""
        return 1 + (1 + distractors) * self.needle_length + self.question_length + DIGITS


@dataclass(frozen=True, eq=False)
class PasskeySample:
    """One prompt with its answer; `length` counts both."""

    prompt_ids: Tensor  # [length - 5] int64; ends with the question
    answer_ids: Tensor  # [5] int64
    question_length: int
    needle_position: int  # index in prompt_ids of the needle's first token
    depth: float
    length: int
    name: str
    seed: int

    @property
    def ids(self) -> Tensor:
        """Prompt and answer, `[length]`."""
        return torch.cat([self.prompt_ids, self.answer_ids])

    @property
    def context_ids(self) -> Tensor:
        """The prompt without its question."""
        return self.prompt_ids[: -self.question_length]

    @property
    def question_ids(self) -> Tensor:
        """The end of the prompt, which the cache under test has to answer."""
        return self.prompt_ids[-self.question_length :]


def passkey_sample(
    filler: Tensor,  # [N] token ids of real text, any integer dtype
    template: PasskeyTemplate,
    *,
    length: int,
    depth: float,
    seed: int,
    distractors: int = 0,
) -> PasskeySample:
    """Hide one key at `depth` (0: the start, 1: just before the question) of a stretch of `filler`.

    `distractors` more needles, with other names and digits, lie at random depths.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    if not 0 <= distractors < len(template.names):
        raise ValueError(
            f"distractors must lie in [0, {len(template.names) - 1}], got {distractors}"
        )
    minimum = template.min_length(distractors)
    gap = length - minimum
    if gap < 0:
        raise ValueError(
            f"length must be at least {minimum} with {distractors} distractors, got {length}"
        )
    if filler.ndim != 1 or len(filler) < gap:
        raise ValueError(
            f"filler must be 1-D with at least {gap} tokens for length {length}, "
            f"got shape {list(filler.shape)}"
        )

    rng = random.Random(seed)
    start = rng.randrange(len(filler) - gap + 1)
    text = filler[start : start + gap].long()
    names = rng.sample(template.names, 1 + distractors)
    keys = [[rng.choice(template.digits) for _ in range(DIGITS)] for _ in names]
    places = [round(depth * gap)] + [rng.randint(0, gap) for _ in range(distractors)]

    parts, done, size, position = [torch.tensor([template.bos])], 0, 1, 1
    for place, i in sorted((place, i) for i, place in enumerate(places)):
        needle = torch.tensor([*template.needles[names[i]], *keys[i], *template.needle_end])
        parts += [text[done:place], needle]
        size += place - done
        position = size if i == 0 else position
        size, done = size + len(needle), place
    parts += [text[done:], torch.tensor(template.questions[names[0]])]
    return PasskeySample(
        prompt_ids=torch.cat(parts),
        answer_ids=torch.tensor(keys[0]),
        question_length=template.question_length,
        needle_position=position,
        depth=depth,
        length=length,
        name=names[0],
        seed=seed,
    )


def passkey_batch(
    filler: Tensor,
    template: PasskeyTemplate,
    *,
    length: int,
    depths: Sequence[float],
    seed: int,
    distractors: int = 0,
) -> list[PasskeySample]:
    """One sample for each depth, all of one length and one question length, so that they stack."""
    return [
        passkey_sample(
            filler,
            template,
            length=length,
            depth=d,
            seed=seed * 100_003 + i,
            distractors=distractors,
        )
        for i, d in enumerate(depths)
    ]


def recall(predictions: Tensor, answers: Tensor) -> float:
    """Share of rows in which every digit is right; both are `[N, 5]`."""
    return (predictions == answers).all(dim=-1).float().mean().item()
