"""Rotations of keys and values from what attention does with them (OSCAR, 2605.17757).

Keys matter through the queries that meet them, values through the scores they get: a layer's
targets are the covariance of its queries, and that of its values weighted by what queries see in
their keys. The rotation is `U H P`: eigenvectors, a Hadamard map that gives every coordinate a part
of each direction, and a permutation by bit-reversed rank, which spreads large ones over groups.
One matrix serves all heads of a layer. As in the authors' code (github.com/FutureMLS-Lab/OSCAR,
compute_kv_rotation.py, targets "qqt" and "sst", composition "r_h_pbr").
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivi.evals.attention_error import AttentionInputs
from kivi.transforms import hadamard


def attention_rotations(x: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices `[D, D]` and `[Dv, Dv]` float32, for keys and values of a layer."""
    heads = x.k.shape[1]
    # [Hkv, n, D]: all query heads of a group are samples of one covariance.
    q = x.q.double().unflatten(1, (heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
    k, v = (t.double().transpose(0, 1).flatten(1, 2) for t in (x.k, x.v))
    queries = q.transpose(1, 2) @ q / q.shape[1]
    weight = ((k @ queries) * k).sum(-1)
    weight = weight / weight.mean(-1, keepdim=True).clamp_min(1e-12)
    values = v.transpose(1, 2) @ (v * weight.unsqueeze(-1)) / v.shape[1]
    return _rotation(queries.mean(0)), _rotation(values.mean(0))


def _rotation(covariance: Tensor) -> Tensor:
    """`U H P` of a symmetric matrix."""
    sizes, directions = torch.linalg.eigh((covariance + covariance.T) / 2)
    d = len(sizes)
    block = d & -d
    mixed: Tensor = hadamard(directions, block)
    mixed /= mixed[0].norm()
    if block != d:
        return mixed.float()
    width = d.bit_length() - 1
    order = sizes.argsort(descending=True)
    place = torch.tensor([int(f"{i:0{width}b}"[::-1], 2) for i in range(d)], device=order.device)
    mixed = mixed[:, torch.empty_like(order).index_copy(0, place, order)]
    return mixed.float().contiguous()
