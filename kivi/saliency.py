"""Which packed tokens matter: the attention that a few queries of the step pay to them."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.kernels.reference import BLOCK_SCORES
from kivi.spec import KVSpec
from kivi.steps import Step

SHARE = 20
"""One of so many queries is a probe because it is recent, one because of where it lies."""


def probe_index(t: int, device: torch.device) -> Tensor:
    """Which of t queries are probes: one in 20, evenly spread, and as many of the last ones."""
    recent = -(-t // SHARE)
    apart = min(recent, t - recent)
    spread = torch.arange(apart, device=device) * (t - recent) // max(apart, 1)
    return torch.cat([spread, torch.arange(t - recent, t, device=device)])


def weighed(step: Step, spec: KVSpec, q: Tensor, scale: float) -> Step:
    """A step with what weighs the tokens that leave the window in it, if a format asks for it.

    Args:
        step: the step.
        spec: how the layer is packed.
        q: `[B, Hq, T, D]`, the step's queries.
        scale: factor of the scores.
    """
    if not spec.weighs_tokens:
        return step
    index = probe_index(q.shape[2], q.device)
    probes, place = q[:, :, index].float() * scale, step.position[:, index]
    return step._replace(weigh=lambda k, first: saliency(probes, place, k, first))


def saliency(probes: Tensor, place: Tensor, k: Tensor, first: Tensor | int) -> Tensor:
    """Normalized attention: what probes pay to a key, divided by how many of them see it.

    As ZipCache (2405.14256, section 4.2), with the softmax over the keys given here.

    Args:
        probes: `[B, Hq, p, D]` float32, scaled.
        place: `[B, p]` their positions; those of negative ones pay nothing.
        k: `[B, Hkv, n, D]` consecutive keys.
        first: position of the first key, `[B]`.

    Returns:
        `[B, Hkv, n, 1]` float32; 0 for a key that no probe sees.
    """
    b, h, n, _ = k.shape
    rows = max(1, BLOCK_SCORES // (b * probes.shape[1] * n))
    paid, seen = probes.new_zeros(b, h, n), probes.new_zeros(b, 1, n)
    key_place = torch.arange(n, device=k.device) + (
        first[:, None] if isinstance(first, Tensor) else first
    )
    for start in range(0, probes.shape[2], rows):
        part = slice(start, start + rows)
        grouped = probes[:, :, part].unflatten(1, (h, -1))
        scores = grouped @ k.float().unsqueeze(2).transpose(-1, -2)
        allow = (key_place.unsqueeze(-2) <= place[:, part, None])[:, None, None]
        weight = torch.where(allow & scores.isfinite(), scores, -1e30).softmax(-1)
        paid = paid + torch.where(allow, weight, 0.0).sum((2, 3))
        seen = seen + allow.sum((2, 3))
    return (paid / seen.clamp_min(1)).unsqueeze(-1)
