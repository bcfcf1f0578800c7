"""The instructions of the kernels' inline assembly on the CPU, for all lanes of a warp at once.

A register is a tensor `[..., lanes]` of 32 bits, or 16, as int64 numbers that are not negative.
"""

import functools
import re
from typing import Any

import torch
from torch import Tensor

ACROSS = ("prmt", "movmatrix", "shfl")  # where it matters which lane holds what
KINDS = {"f16": torch.float16, "bf16": torch.bfloat16}
BYTES = {"u8": 1, "b16": 2, "b32": 4}
LANE = torch.arange(32)


def bits_of(x: Tensor) -> Tensor:
    """The bits of 16-bit numbers."""
    return x.contiguous().view(torch.int16).long() & 0xFFFF


def number(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """16-bit numbers by their bits."""
    return bits.to(torch.int16).view(dtype).double()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of float64 numbers, rounded once."""
    y = x.float()
    # To odd, where float32 is between: then the second rounding is as if there were no first.
    wrong = (y.double() != x) & y.isfinite() & (y.view(torch.int32) % 2 == 0)
    toward = torch.where(y.double() < x, torch.inf, -torch.inf).float()
    return bits_of(torch.where(wrong, torch.nextafter(y, toward), y).to(dtype))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & 0xFFFF, x >> 16


def _in_pairs(function: Any, kind: str, x: list[Tensor]) -> Tensor:
    """A function of numbers on both halves of registers."""
    dtype = KINDS[kind.removesuffix("x2")]
    halves = zip(*map(_halves, x), strict=True)
    low, high = (rounded(function(*(number(y, dtype) for y in half)), dtype) for half in halves)
    return low | high << 16


def _single(x: Tensor) -> Tensor:
    """Numbers of 32 bits."""
    return x.to(torch.int32).view(torch.float32)


def _bits_of_single(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & 0xFFFFFFFF


def _logic(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            x, y, z = (v if i & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
            out = out | (x & y & z & 0xFFFFFFFF)
    return out


def _permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    chosen = int(selector.flatten()[0])
    assert (selector == chosen).all()
    out = torch.zeros_like(a)
    for i in range(4):
        byte = chosen >> 4 * i & 15
        value = (a, b)[byte % 8 // 4] >> byte % 4 * 8 & 255
        if byte >= 8:  # eight times its sign
            value = (value >> 7) * 255
        out = out | value << 8 * i
    return out


def _transpose(x: Tensor) -> Tensor:
    """8 x 8 halves, row r in lanes 4 r to 4 r + 3."""
    both = torch.stack(_halves(x), -1).unflatten(-2, (8, 4)).flatten(-2)
    low, high = both.transpose(-1, -2).reshape(*x.shape, 2).unbind(-1)
    return low | high << 16


def _dot_bytes(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    for i in range(4):
        total = total + (a >> 8 * i & 255) * (b >> 8 * i & 255)
    return total & 0xFFFFFFFF


def _of_singles(operation: str, x: list[Tensor]) -> Tensor:
    """float32 arithmetic; what is approximate on a GPU is exact but for its rounding."""
    a, *others = (_single(y).double() for y in x)
    match operation:
        case "neg":
            out = -a
        case "max":
            out = torch.maximum(a, others[0])
        case "mul":
            out = a * others[0]
        case "fma":
            out = a * others[0] + others[1]
        case "rcp":
            out = 1 / a
        case "rsqrt":
            out = a.rsqrt()
        case _:
            raise NotImplementedError(operation)
    return _bits_of_single(out.float())


def _value(name: str, x: list[Tensor]) -> Tensor:
    """What an instruction makes of its operands."""
    operation, *kinds = name.split(".")
    if kinds[-1] == "f32":
        return _of_singles(operation, x)
    match operation:
        case "mov":
            return x[0]
        case "and":
            return x[0] & x[1]
        case "or":
            return x[0] | x[1]
        case "xor":
            return x[0] ^ x[1]
        case "shl":
            return x[0] << x[1] & 0xFFFFFFFF
        case "shr":
            return x[0] >> x[1]
        case "lop3":
            return _logic(*x)
        case "prmt":
            return _permute(*x)
        case "movmatrix":
            return _transpose(x[0])
        case "shfl":
            assert int(x[2]) == 31
            return x[0][..., LANE ^ x[1] if "bfly" in kinds else x[1]]
        case "neg":
            return x[0] ^ 0x80008000
        case "fma":
            return _in_pairs(lambda a, b, c: a * b + c, kinds[-1], x)
        case "min":
            return _in_pairs(torch.minimum, kinds[-1], x)
        case "max":
            return _in_pairs(torch.maximum, kinds[-1], x)
        case "dp4a":
            return _dot_bytes(*x)
        case "cvt" if kinds == ["u16", "u32"]:
            return x[0] & 0xFFFF
        case "cvt":
            return _bits_of_single(number(x[0], KINDS[kinds[1]]).float())
    raise NotImplementedError(name)


@functools.cache
def _parsed(text: str) -> list[tuple[str, str, list[str]]]:
    lines = []
    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name not in ("", ".reg"):
            target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
            lines.append((name, target, sources))
    return lines


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}[]").split(",")]


def _move(name: str, target: str, source: str, read: Any, registers: Any, memory: Any) -> None:
    """To or from memory."""
    size, loads = BYTES[name.rpartition(".")[2]], name.startswith("ld")
    address, names = (source, target) if loads else (target, source)
    at = read(*_names(address))
    if ".v4." in name:
        assert not (at % 16).any(), "not aligned"
    for i, register in enumerate(_names(names)):
        if loads:
            registers[register] = memory.load(at + i * size, size)
        else:
            memory.store(at + i * size, size, read(register))


def run_ptx(text: str, registers: dict[str, Tensor], memory: Any = None) -> None:
    """Run instructions; registers are read and written by name, memory by its `load`, `store`."""

    def read(source: str) -> Tensor:
        if source == "%laneid":
            return LANE
        if source in registers:
            return registers[source]
        return torch.tensor(int(source[2:], 16) if source[:2] == "0f" else int(source, 0))

    for name, target, sources in _parsed(text):
        if name.startswith("prefetch"):
            continue
        if name.startswith(("ld.", "st.")):
            _move(name, target, *sources, read, registers, memory)
            continue
        value = _value(name, [read(source) for source in sources])
        if target.startswith("{"):
            low, high = target.strip("{ }").split(",")
            registers[low.strip()], registers[high.strip()] = _halves(value)
        else:
            registers[target] = value


def lanes_of(x: Tensor) -> Tensor:
    """Which elements of a tensor a warp's lanes hold, `[registers, 32]`.

    In a layout that it was converted to, as `[.., 8, 4]` numbers of heads, or as an MMA's result.
    """
    index = torch.arange(x.numel())
    layout = getattr(x, "held", None)
    if layout is not None:
        reg_bases, lane_bases, shape = layout
        assert list(x.shape) == shape
        strides = index.view(shape).stride()

        def places(bases: list[list[int]]) -> Tensor:
            at = torch.zeros(1, dtype=torch.int64)
            for base in bases:
                step = sum(i * stride for i, stride in zip(base, strides, strict=True))
                at = torch.cat([at, at + step])
            return at

        return places(reg_bases)[:, None] + places(lane_bases)
    if x.shape[-2:] == (8, 4):
        return index.view(-1, 32)
    assert x.dim() == 2 and x.shape[1] == 8
    return index.view(-1, 32, 2).transpose(1, 2).reshape(-1, 32)


def inline_asm(
    text: str, _constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """`gl.inline_asm_elementwise`."""
    assert is_pure or text.startswith("mov")  # which only stays where it is
    given = [torch.as_tensor(x) for x in args]
    given = [x.int() if x.dtype == torch.int64 else x for x in given]
    across = any(name in text for name in ACROSS)
    place = lanes_of(args[0]) if across else torch.arange(args[0].numel())[:, None]
    lanes = place.shape[1]
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    names = (f"${i}" for i in range(99))
    out = [[next(names) for _ in range(kind.itemsize * pack // 4)] for kind in kinds]
    registers = {}
    for x in torch.broadcast_tensors(*given):
        x = x.flatten()[place].view(-1, pack, lanes).transpose(1, 2).reshape(-1)
        bits = x.view(torch.int32).long() & 0xFFFFFFFF
        for register in bits.view(len(place) // pack, lanes, -1).unbind(-1):
            registers[next(names)] = register
    run_ptx(text, registers)
    results = []
    for kind, written in zip(kinds, out, strict=True):
        bits = torch.stack([registers[name] for name in written], -1)
        y = torch.empty(args[0].numel(), dtype=kind)
        y[place] = bits.to(torch.int32).view(kind).transpose(1, 2).reshape(place.shape)
        results.append(y.view(args[0].shape))
    return tuple(results) if isinstance(dtype, tuple) else results[0]
