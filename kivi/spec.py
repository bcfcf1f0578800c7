"""What a scheme declares: frozen, validated and free of torch.

Words used everywhere (units in brackets): `bits` per code, group size `G` [tokens or channels],
page `P` = 512 [tokens], residual length `R` [tokens kept exact at the end], sink length `S`
[tokens kept exact at the start].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

PAGE_TOKENS = 512
"""Tokens in a page, whatever the bits, so that keys and values share one block table."""
TILE_ROWS = 32
"""Tokens in one plane of a word tile: the rows of a tile."""
WORD_BITS = 16
"""Bits in a packed word, and in a stored scale or zero."""

PLACE_BYTES = 4
"""Bytes of the position of a unit whose rotary embedding was undone."""

BITS = (1, 2, 3, 4, 8)
Axis = Literal["channel", "token"]
Grid = Literal["asymmetric", "symmetric", "least_squares", "midpoint", "unbiased"]
Transform = Literal["hadamard", "hadamard_32"]
Smooth = Literal["outliers", "max", "sqrt"]


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r} is not allowed; choose from {choices}")


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raise a ValueError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; it must be an integer >= {least}")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor `[B, Hkv, T, D]` is quantized and packed.

    Args:
        bits: bits per code, one of 1, 2, 3, 4, 8.
        axis: `"channel"`: one scale for each channel and each group of G tokens (per-channel);
            `"token"`: one scale for each token and each group of G channels (per-token).
        group_size: G. Per-channel: 16, 32, 64, 128 tokens, or None for the whole page (512).
            Per-token: 16 to 128 channels, or None for the whole head; a group never spans heads,
            so a G above the head dimension means the whole head.
        grid: how scale and zero are found: `"asymmetric"` min-max (KIVI, 2402.02750, eq. 1),
            `"symmetric"` absolute maximum, `"least_squares"` min-max and one refit of scale and
            zero to the codes, `"midpoint"` absolute maximum with 0 halfway between two codes,
            `"unbiased"` midpoint codes of least squared error with the scale that keeps
            `<quantized, x> = <x, x>` (see `kivi.grids.fit`).
        clip: the part of the range, (0, 1], that the codes of a min-max or absolute maximum cover.
        transform: orthogonal map of each token before anything else: `"hadamard"` over the head
            (over blocks of the largest power of two that divides it), `"hadamard_32"` over blocks
            of 32 channels. Sinks and the exact window are never transformed.
        center: per-token only: this many tokens share their channels' means, which are subtracted
            before groups are formed: 16, 32, 64 or 128.
        token_norm: per-channel only: each token is divided by its norm before groups are formed.
        smooth: before all that, each channel of a sequence is divided by a power of two, found from
            its first 32 packed tokens (`kivi.transforms.smooth_factor`): `"outliers"` brings
            channels that vary much more than the median one down to about four times as much,
            `"max"` divides by the largest magnitude, `"sqrt"` by its root, of the two channels
            that RoPE mixes together.

    Raises:
        ValueError: for a value that is not in these lists.
    """

    bits: int
    axis: Axis
    group_size: int | None = 32
    grid: Grid = "asymmetric"
    clip: float = 1.0
    transform: Transform | None = None
    center: int | None = None
    token_norm: bool = False
    smooth: Smooth | None = None
    pre_rope = weighs_tokens = False  # see OpaqueSpec

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_choice("axis", self.axis, get_args(Axis))
        check_choice("grid", self.grid, get_args(Grid))
        check_choice("transform", self.transform, (*get_args(Transform), None))
        check_choice("token_norm", self.token_norm, (False, True))
        check_choice("smooth", self.smooth, (*get_args(Smooth), None))
        if type(self.clip) not in (int, float) or not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip!r} is not allowed; it must lie in (0, 1]")
        if self.clip != 1 and self.grid == "unbiased":
            raise ValueError(f"clip={self.clip} is not allowed with grid='unbiased'; it must be 1")
        if self.axis == "channel":
            check_choice("group_size", self.group_size, (16, 32, 64, 128, None))
            check_choice("center", self.center, (None,))
            return
        check_choice("center", self.center, (16, 32, 64, 128, None))
        check_choice("token_norm", self.token_norm, (False,))
        if self.group_size is not None:
            check_count("group_size", self.group_size, 16)
            if self.group_size > 128:
                raise ValueError(
                    f"group_size={self.group_size} is not allowed; choose 16 to 128 or None (head)"
                )

    @property
    def has_zero(self) -> bool:
        """Whether a zero is stored beside each scale (other grids derive it)."""
        return self.grid in ("asymmetric", "least_squares")

    @property
    def stable(self) -> bool:
        """Whether quantizing what was quantized finds it again: a clipped range shrinks anew."""
        return self.clip == 1

    @property
    def unit(self) -> int:
        """Tokens that are quantized together."""
        return self.group(0) if self.axis == "channel" else self.center or 1

    def block(self, head_dim: int) -> int:
        """Channels that the transform mixes; 1 without one.

        Raises:
            ValueError: if blocks of at least 16 channels do not divide `head_dim`.
        """
        if self.transform is None:
            return 1
        block = min(head_dim & -head_dim, 32 if self.transform == "hadamard_32" else head_dim)
        if block < 16:
            raise ValueError(
                f"transform={self.transform!r} does not fit head_dim={head_dim}, which must be a "
                "multiple of 16"
            )
        return block

    def group(self, head_dim: int) -> int:
        """The group size in elements for a head dimension.

        Raises:
            ValueError: if per-token groups of this size do not divide `head_dim`.
        """
        if self.axis == "channel":
            return self.group_size or PAGE_TOKENS
        group = min(self.group_size or head_dim, head_dim)
        if head_dim % group:
            fits = [g for g in range(16, min(head_dim, 128) + 1) if head_dim % g == 0]
            raise ValueError(
                f"group_size={group} does not divide head_dim={head_dim}; "
                f"choose from {fits or 'None'} or None for the whole head"
            )
        return group

    def bits_per_element(self, head_dim: int) -> float:
        """Bits stored for an element, 16-bit scales, zeros, means and norms counted."""
        check_count("head_dim", head_dim, 1)
        self.block(head_dim)  # raises where it does not fit
        shared = (1 + self.has_zero) / self.group(head_dim) + self.token_norm / head_dim
        return self.bits + WORD_BITS * (shared + (1 / self.center if self.center else 0))


@dataclass(frozen=True)
class Rope:
    """A model's rotary embedding: channel i of a token at position p is turned with its partner.

    It becomes `cos(p f_i) x_i - sin(p f_i) x_partner(i)`. `frequency`: f, signed, in radians; 0 for
    channels that are not turned. `partner`: the other channel of each pair. Channels past their end
    are not turned either.
    """

    frequency: tuple[float, ...]
    partner: tuple[int, ...]


class OpaqueSpec(ABC):
    """How one tensor is stored by a scheme that no QuantSpec describes: a frozen dataclass.

    It says what a unit of tokens becomes and back; paging, caching, torch.compile, transformers and
    the evaluations are generic. There is no fused kernel for it: attention decodes whole pages.

    `bits`: of a code, for tables. `unit`: tokens that are encoded together, a power of two up to
    512. `stable`: whether a tensor that was decoded encodes to about itself; a random sketch
    does not. `pre_rope`: for keys, which are encoded as they were before the model's rotary
    embedding, where it is known: `rope` is then a field that holds it, and generic code turns
    tokens back and forth (four bytes for each unit say where it stands). `weighs_tokens`: what it
    does depends on the attention that tokens get, see `encode_weighted`.
    """

    bits: int
    unit: int = 1
    stable: bool = True
    smooth: None = None
    pre_rope: bool = False
    rope: Rope | None = None
    weighs_tokens: bool = False

    @abstractmethod
    def nbytes(self, head_dim: int) -> int:
        """Bytes of an encoded unit.

        Raises:
            ValueError: for a head dimension that does not fit.
        """

    @abstractmethod
    def encode(self, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """Encode units; no token that is not valid may change what others become.

        Args:
            x: `[..., unit, D]` float32.
            valid: bool, broadcastable to `[..., unit]`.

        Returns:
            Tensors `[..., n]` of any dtypes, together `nbytes` bytes for each unit.
        """

    def encode_weighted(
        self, x: Tensor, valid: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`encode`, for a format that weighs tokens.

        `weight`: `[..., unit]` float32, the attention that tokens get from a few queries of the
        step (`kivi.saliency`); None where keys and values are stored without queries.
        """
        return self.encode(x, valid)

    @abstractmethod
    def decode(self, data: Tensor, head_dim: int) -> Tensor:
        """The tokens `[..., unit, D]` float32 of encoded units, `[..., nbytes]` uint8."""

    def coarse(self) -> OpaqueSpec:
        """What reads the most significant bits alone of the same bytes (see `Sparse`)."""
        return self

    def bits_per_element(self, head_dim: int) -> float:
        """Bits stored for an element, everything counted."""
        check_count("head_dim", head_dim, 1)
        return 8 * self.unit_nbytes(head_dim) / (self.unit * head_dim)

    def unit_nbytes(self, head_dim: int) -> int:
        """Bytes of a unit as stored: `nbytes`, and where it stands if that must be known."""
        return self.nbytes(head_dim) + PLACE_BYTES * self.pre_rope


Spec = QuantSpec | OpaqueSpec
"""How one tensor is quantized."""


@dataclass(frozen=True)
class Sparse:
    """What attention of a few queries leaves out (`kivi.kernels.sparse`).

    Args:
        threshold: the probability from which on the most significant bits of keys are enough.
        values: the part of the values, those of the largest probabilities, that are read.

    Raises:
        ValueError: for a part outside of (0, 1] or a negative threshold.
    """

    threshold: float
    values: float = 1.0

    def __post_init__(self) -> None:
        if type(self.threshold) not in (int, float) or not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r} is not allowed; it must be >= 0")
        if type(self.values) not in (int, float) or not 0 < self.values <= 1:
            raise ValueError(f"values={self.values!r} is not allowed; it must lie in (0, 1]")


@dataclass(frozen=True)
class KVSpec:
    """How a layer's keys and values are kept.

    Args:
        key: the keys' spec, or None to keep them in the model's own dtype.
        value: likewise for the values.
        residual_length: R, the most recent tokens that always stay exact.
        sink_length: S, the first tokens that always stay exact.
        window: queries see so many most recent tokens, themselves included, and the sinks; what
            lies between is dropped, and sinks move up to the window (`kivi.sinks`). None keeps all.
        rope: how the model turns keys, where there is a window (see `with_rope`).
        sparse: what attention leaves out; None reads all.

    Raises:
        ValueError: for a negative or non-integer length, or a window below 1.
    """

    key: Spec | None
    value: Spec | None
    residual_length: int = 128
    sink_length: int = 0
    window: int | None = None
    rope: Rope | None = None
    sparse: Sparse | None = None

    def __post_init__(self) -> None:
        check_count("residual_length", self.residual_length)
        check_count("sink_length", self.sink_length)
        check_count("window", 1 if self.window is None else self.window, 1)

    def narrow(self, window: int | None) -> int | None:
        """The smaller of a window of queries and the spec's own; None where there is neither."""
        if window is None or self.window is None:
            return self.window if window is None else window
        return min(window, self.window)

    @property
    def unit(self) -> int:
        """Tokens that leave the exact window together: whole planes and whole groups."""
        key, value = self.key, self.value  # no loop: steps ask each time
        return max(TILE_ROWS, key.unit if key else 1, value.unit if value else 1)

    @property
    def weighs_tokens(self) -> bool:
        """Whether keys or values ask how much attention tokens get."""
        return any(one is not None and one.weighs_tokens for one in (self.key, self.value))

    @property
    def asks_for_rope(self) -> bool:
        """Whether keys, or sinks that move, are turned as the model does."""
        return self.window is not None or (self.key is not None and self.key.pre_rope)

    def with_rope(self, rope: Rope | None) -> KVSpec:
        """The spec in a model that turns keys so: for formats that undo it, and sinks that move."""
        spec = self if self.window is None else replace(self, rope=rope)
        if isinstance(self.key, OpaqueSpec) and self.key.pre_rope:
            spec = replace(spec, key=replace(self.key, rope=rope))  # type: ignore[type-var]
        return spec

    def bits_per_element(self, head_dim: int, value_head_dim: int | None = None) -> float:
        """Mean bits of a packed key or value element; 16 for what stays unquantized."""
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_count("head_dim", head_dim, 1)
        check_count("value_head_dim", value_head_dim, 1)
        pairs = ((self.key, head_dim), (self.value, value_head_dim))
        bits = [d * (s.bits_per_element(d) if s else WORD_BITS) for s, d in pairs]
        return sum(bits) / sum(d for _, d in pairs)
