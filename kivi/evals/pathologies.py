"""Synthetic caches with what is known to break quantizers, as inputs of `attention_errors`.

Queries look for one past token each, so that attention is about as sharp as in a trained model: the
standard deviation of a query's scores is SHARPNESS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.evals.attention_error import AttentionInputs

SHARPNESS = 4.0
PATHOLOGIES = (
    "plain",
    "outlier channels",
    "outlier channels, quiet queries",
    "outlier offsets",
    "key bias",
    "near-constant channels",
    "heavy tails",
    "uneven tokens",
    "sinks",
)


def pathology(name: str, head_dim: int = 128, tokens: int = 1536, seed: int = 0) -> AttentionInputs:
    """Keys and values `[1, 2, T, D]`, queries `[1, 4, T, D]` and exact attention over them.

    "plain": independent Gaussians. "outlier channels": two key channels vary 100 and 60 times as
    much; "quiet queries": and queries are as much smaller there, as in a model trained with it.
    "outlier offsets": the two are shifted by 100 and -60 in place of that. "key bias": every key
    channel has an offset 20 times its spread. "near-constant channels": every other channel of keys
    and values has a spread of 0.001. "heavy tails": Student's t with 3 degrees of freedom. "uneven
    tokens": norms of tokens vary by a factor up to e each way. "sinks": the first four keys are
    20 times as long, their values 0.01 times.

    Raises:
        ValueError: for a name that is not in PATHOLOGIES.
    """
    if name not in PATHOLOGIES:
        raise ValueError(f"name={name!r} is not allowed; choose from {PATHOLOGIES}")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (1, 2, tokens, head_dim)
    k, v, loud = randn(*shape), randn(*shape), torch.ones(head_dim)
    if name.startswith("outlier channels"):
        loud[5], loud[head_dim // 2 + 9] = 100, 60
        k = k * loud
    if name == "outlier offsets":
        k[..., 5], k[..., head_dim // 2 + 9] = k[..., 5] + 100, k[..., head_dim // 2 + 9] - 60
    if name == "key bias":
        k = k + 20 * randn(1, 2, 1, head_dim)
    if name == "near-constant channels":
        k[..., ::2], v[..., ::2] = 3 + 1e-3 * k[..., ::2], 1 + 1e-3 * v[..., ::2]
    if name == "heavy tails":
        k, v = (x / (randn(3, *shape).square().mean(0)).sqrt() for x in (k, v))
    if name == "uneven tokens":
        k, v = (
            x * (2 * torch.rand(1, 2, tokens, 1, generator=generator) - 1).exp() for x in (k, v)
        )
    if name == "sinks":
        k[:, :, :4], v[:, :, :4] = 20 * k[:, :, :4], 0.01 * v[:, :, :4]
    # What a query looks for, in channels of equal spread; it is anywhere before it.
    rest = k - k.mean(2, keepdim=True)
    rest = (rest / rest.std(2, keepdim=True)).repeat_interleave(2, 1)
    place = (torch.rand(1, 4, tokens, generator=generator) * torch.arange(tokens)).long()
    q = rest.gather(2, place[..., None].expand(-1, -1, -1, head_dim)) + randn(
        1, 4, tokens, head_dim
    )
    q = q / loud if "quiet" in name else q
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    q = q * (SHARPNESS / scores.std(-1, keepdim=True))
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(later, -torch.inf)
    return AttentionInputs(q, k, v, scores.softmax(-1) @ v.repeat_interleave(2, 1), 1.0)
