"""OSCAR (2605.17757): tokens turned to what attention makes of them, clipped, in 2 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kivi.grids import encode, fit
from kivi.packing import join_bits, of_bytes, split_bits
from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec, OpaqueSpec, QuantSpec
from kivi.transforms import hadamard, precise


@cache
def _read(file: str, _written: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"file={file!r} is not a file of rotations: {error}") from error


def _written(file: str) -> int:
    """When a file was written last: it may be tuned again."""
    try:
        return Path(file).stat().st_mtime_ns if file else 0
    except OSError as error:
        raise ValueError(f"file={file!r} cannot be read: {error}") from error


@cache
def _matrix(file: str, written: int, name: str, head_dim: int, device: torch.device) -> Tensor:
    if not file:
        matrix: Tensor = hadamard(torch.eye(head_dim), head_dim & -head_dim)
        matrix /= matrix[0].norm()
        return matrix.to(device)
    matrices = _read(file, written)
    if name not in matrices or matrices[name].shape != (head_dim, head_dim):
        shapes = {n: tuple(m.shape) for n, m in matrices.items()}
        raise ValueError(f"file={file!r} has no {name!r} for head_dim={head_dim}, only {shapes}")
    return matrices[name].to(device)


# An operator: torch.compile could tell neither constants of several layers apart nor read a file.
@torch.library.custom_op("kivi::rotation", mutates_args=())
def rotation(file: str, name: str, head_dim: int, device: torch.device) -> Tensor:
    """The orthogonal matrix `[D, D]` that tokens are multiplied by: of the file, or Hadamard's.

    Raises:
        ValueError: for a file that cannot be read, or that has no such matrix.
    """
    return _matrix(file, _written(file), name, head_dim, device).clone()


@rotation.register_fake
def _(file: str, name: str, head_dim: int, device: torch.device) -> Tensor:
    return torch.empty(head_dim, head_dim, device=device)


@dataclass(frozen=True)
class Rotated(OpaqueSpec):
    """A token is rotated, clipped and quantized by asymmetric min-max in groups of 128 channels.

    `clip`: the rank of the magnitude, as a part of the head, at which it is cut off. `name`: of the
    matrix in the file; without a file ("") it is Hadamard's.
    """

    file: str
    name: str
    clip: float
    bits = 2

    def nbytes(self, head_dim: int) -> int:
        """See OpaqueSpec."""
        if head_dim % 8:
            raise ValueError(f"head_dim={head_dim} is not allowed; it must be a multiple of 8")
        rotation(self.file, self.name, head_dim, torch.device("cpu"))
        return head_dim // 4 + 4 * head_dim // QuantSpec(2, "token", 128).group(head_dim)

    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See OpaqueSpec."""
        d = x.shape[-1]
        x = x.squeeze(-2).nan_to_num(0.0, 0.0, 0.0)
        x = precise(x, rotation(self.file, self.name, d, x.device)).float()
        rank = min(int(self.clip * d), d - 1)
        most = x.abs().sort(-1).values[..., rank : rank + 1]
        groups = x.clamp(-most, most).unflatten(-1, (-1, QuantSpec(2, "token", 128).group(d)))
        every = torch.ones((), dtype=torch.bool, device=x.device)
        scale, zero = fit(groups, every, 2, "asymmetric", torch.float16)
        codes = encode(groups, scale, zero, 2).flatten(-2)
        return join_bits(codes, 2), scale.flatten(-2).half(), zero.flatten(-2).half()

    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """See OpaqueSpec."""
        meta = (data.shape[-1] - head_dim // 4) // 2
        codes, *others = data.split([head_dim // 4, meta, meta], -1)
        scale, zero = (of_bytes(e, torch.float16).float().unsqueeze(-1) for e in others)
        groups = split_bits(codes, 2).unflatten(-1, (meta // 2, -1))
        x: Tensor = (groups * scale + zero).flatten(-2)
        x = x @ rotation(self.file, self.name, head_dim, data.device).T
        return x.unsqueeze(-2)


@dataclass(frozen=True, kw_only=True)
class Oscar(KVQuantizer, name="oscar_cov", paper="2605.17757"):
    """Offline spectral covariance-aware rotation, 64 sinks and 256 recent tokens exact.

    `kivi tune --scheme oscar_cov --out rotations.safetensors` finds the rotations of a model's
    layers (`kivi.evals.rotations`); without a file it is the authors' data-free one, Hadamard's.
    Not OScaR: that is `oscar_omni`.
    """

    file: str | None = None
    key_clip: float = 0.96
    value_clip: float = 0.92
    residual_length: int = 256
    sink_length: int = 64

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec; of any layer, None, it is the first one's."""
        file = self.file or ""
        if file:
            _read(file, _written(file))  # raises at once
        for kind, clip in (("key", self.key_clip), ("value", self.value_clip)):
            if type(clip) not in (int, float) or not 0 < clip <= 1:
                raise ValueError(f"{kind}_clip={clip!r} is not allowed; it must lie in (0, 1]")
        key = Rotated(file, f"key.{layer_idx or 0}", self.key_clip)
        value = Rotated(file, f"value.{layer_idx or 0}", self.value_clip)
        return KVSpec(key, value, self.residual_length, self.sink_length)
