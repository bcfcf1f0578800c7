"""Short ways to the kernels: who still gets the operator, and what is launched again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from kivi import KVSpec, LayerCache, QuantSpec
from kivi.kernels import triton_decode, triton_direct, triton_fast, triton_mapped
from kivi.kernels.triton_decode import decode_attention
from kivi.kernels.triton_direct import direct

KIVI = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), 32, 4)
PLAIN = torch.ones(2, 3)


class Seen(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def state(tokens: int = 90, d: int = 32, rows: int = 2) -> tuple[LayerCache, Tensor, Tensor]:
    layer = LayerCache(KIVI, rows, 2, d, dtype=torch.float16, impl="eager")
    k, v = torch.randn(2, rows, 2, tokens, d).half()
    layer.append(k, v)
    return layer, torch.randn(rows, 4, 1, d).half(), torch.full((rows, 1), tokens - 1)


def asked(seen: list[bool]) -> Callable[[Tensor], Tensor]:
    """A function that notes what `direct` says where it is called."""

    def inside(x: Tensor) -> Tensor:
        seen.append(direct(x, None, cpu=True))
        return x * 2

    return inside


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_plain_tensors_go_straight_to_the_kernel(mode: Callable[[], Any]) -> None:
    with mode():
        assert direct(PLAIN, None, cpu=True)
        assert not direct(PLAIN)  # on the CPU there is an interpreter or nothing
    with torch.autocast("cpu"):
        assert direct(PLAIN, cpu=True)
    weight = torch.nn.Parameter(PLAIN.clone())
    assert not direct(weight, cpu=True)
    with torch.no_grad():
        assert direct(weight * 1, cpu=True)
    assert not direct(weight * 1, cpu=True) and not direct(PLAIN, weight * 1, cpu=True)


def test_whoever_traces_transforms_or_watches_gets_the_operator() -> None:
    seen: list[bool] = []
    inside = asked(seen)
    torch.vmap(inside)(PLAIN)
    torch.func.grad(lambda x: inside(x).sum())(PLAIN)
    torch.func.functionalize(inside)(PLAIN)
    torch.jit.trace(inside, PLAIN, check_trace=False)
    with FakeTensorMode() as mode:
        inside(mode.from_tensor(PLAIN))
    inside(FakeTensorMode().from_tensor(PLAIN))
    with Seen():
        inside(PLAIN)
    with torch.device("meta"):  # a function mode
        inside(PLAIN)
    inside(PLAIN.to("meta"))
    torch.compile(inside, backend="eager", fullgraph=True)(PLAIN)
    assert len(seen) >= 9 and not any(seen)
    assert direct(PLAIN, cpu=True)


def test_the_short_way_gives_what_the_operator_gives() -> None:
    layer, q, position = state()
    arguments = (q, layer._view(), KIVI, position, 0.2)
    out, lse = decode_attention(*arguments)
    with Seen() as seen:
        other, other_lse = decode_attention(*arguments)
    assert "kivi::decode_attention" in seen.names
    assert torch.equal(out, other) and torch.equal(lse, other_lse)


def test_numbers_are_those_that_the_operator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    real = triton_decode._attend
    monkeypatch.setattr(triton_decode, "_attend", lambda *a: given.append(a) or real(*a))
    layer, q, position = state()
    decode_attention(q, layer._view(), KIVI, position, 1, None, 3)
    assert [type(x) for x in given[0][-3:]] == [float, type(None), float]


def test_specs_are_known_by_who_they_are() -> None:
    """Not by where they lay: an id would be given to another one once they are gone."""
    layer, q, _ = state()
    view = layer._view()
    for n in range(200):
        spec = KVSpec(QuantSpec(1 + n % 4, "channel", 32), QuantSpec(2, "token", 16), 32, n % 3)
        found = triton_mapped.ready(q, q.shape, q.device, view, spec, None, None)
        assert found.known == triton_mapped.read(spec, 32, 32) and found.known.spec is spec
        assert triton_mapped.ready(q, q.shape, q.device, view, spec, None, None) is found


# ---------------------------------------------------------------- launches of the Gluon kernel


class Call(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    stream: int | None


class Compiled:
    """What Triton gives back of a launch."""

    function, packed_metadata = 7, (1, 1, 0)

    def __init__(self, name: str, calls: list[Call]) -> None:
        self.name, self.calls = name, calls

    def run(self, *all_: Any) -> None:
        assert all_[4:9] == (7, (1, 1, 0), None, None, None)
        self.calls.append(Call(self.name, all_[:3], all_[9:], all_[3]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *a, stream: self.calls.append(Call("hooked " + self.name, grid, a, stream))


class Kernel:
    """A jitted function that notes its launches."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(*arguments: Any, **_: Any) -> Compiled:
            self.calls.append(Call(self.name, grid, arguments, None))
            return Compiled(self.name, self.calls)

        return launch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Launches on a GPU of 132 multiprocessors whose current stream is 5."""
    made: list[Call] = []
    triton_mapped.forget()
    for name in ("decode_kernel", "combine_kernel"):
        monkeypatch.setattr(triton_fast, name, Kernel(name, made))
    monkeypatch.setattr(triton_fast, "_gpu", lambda device: (132, 232448, 9))
    monkeypatch.setattr(triton_fast, "on_device", lambda device: triton_direct._HERE)
    monkeypatch.setattr(triton_fast, "stream", lambda device: 5)
    yield made
    triton_mapped.forget()


def addresses(call: Call) -> tuple[Any, ...]:
    return tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in call.arguments)


@pytest.mark.parametrize(("tokens", "kernels"), [(60, 1), (3000, 2)])  # alone; shared and merged
def test_a_launch_is_repeated_with_new_addresses(
    tokens: int, kernels: int, calls: list[Call]
) -> None:
    layer, q, position = state(tokens, 64, 1)
    view, aux = layer._view(), torch.zeros(4)
    decode_attention(q, view, KIVI, position, 0.2, s_aux=aux)
    first = calls[:]
    assert [call.kernel for call in first] == ["decode_kernel", "combine_kernel"][:kernels]
    calls.clear()
    moved, other = q.clone(), view._replace(exact_key=view.exact_key.clone())
    out, lse = decode_attention(moved, other, KIVI, position, 0.3, s_aux=aux)
    assert [(c.kernel, c.grid) for c in calls] == [(c.kernel, c.grid) for c in first]
    assert {call.stream for call in calls} == {5}
    old, new = addresses(first[0]), calls[0].arguments
    assert new[0] == moved.data_ptr() and new[9] == other.exact_key.data_ptr()
    assert new[15:17] == (out.data_ptr(), lse.data_ptr()) and new[19] == 0.3
    same = {*range(len(old))} - {0, 9, 13, 14, 15, 16, 19}
    assert all(old[i] == new[i] for i in same)
    if kernels == 2:
        parts, sums = addresses(first[1])[:2]
        merge = calls[1].arguments
        assert merge[1] - merge[0] == sums - parts == new[14] - new[13] > 0
        assert merge[:2] == new[13:15] and merge[2:4] == (new[8], new[11])
        assert merge[4:7] == new[15:18] and merge[7:] == first[1].arguments[7:]


def test_what_the_code_depends_on_is_launched_anew(calls: list[Call]) -> None:
    layer, q, position = state(3000, 64, 1)
    view = layer._view()
    variants: list[dict[str, Any]] = [
        {},
        {"softcap": 2.0},
        {"s_aux": torch.zeros(4)},
        {"s_aux": torch.zeros(4).half()},
        {"q": q.repeat(1, 2, 1, 1)},
        {"view": view._replace(table=view.table.repeat(1, 2))},
        {"view": view._replace(key=view.key._replace(zero=None))},
    ]
    for variant in variants:
        for stream in (None, 5):
            calls.clear()
            given = {"q": q, "view": view, "spec": KIVI, "query_position": position, "scale": 0.2}
            decode_attention(**{**given, **variant})
            assert [call.stream for call in calls] == [stream] * 2


def test_profilers_hear_of_launches(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, q, position = state(60, 64, 1)
    decode_attention(q, layer._view(), KIVI, position, 0.2)
    calls.clear()
    hooks = triton_direct.knobs.runtime.launch_exit_hook
    hooks.add(print)
    try:
        decode_attention(q, layer._view(), KIVI, position, 0.2)
    finally:
        hooks.remove(print)
    assert [(call.kernel, call.stream) for call in calls] == [("hooked decode_kernel", 5)]


def test_what_compiled_nothing_is_launched_anew(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a hook keeps Triton from compiling."""
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **_: calls.append(a))
    layer, q, position = state(60, 64, 1)
    for n in (1, 2):
        decode_attention(q, layer._view(), KIVI, position, 0.2)
        assert len(calls) == n and isinstance(calls[-1][0], Tensor)


def test_the_launcher_of_triton_3_6_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would call gets the arguments that it would pass, unless there is scratch memory."""

    class CudaLauncher:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = False, True
        launch = staticmethod(lambda *_: None)

    compiled = Compiled("k", [])
    compiled.run = CudaLauncher()
    monkeypatch.setattr(triton_direct.triton, "__version__", "3.6.0")
    call, code = triton_direct._launcher(compiled)
    assert call is CudaLauncher.launch
    assert code == (7, False, True, None, None, (1, 1, 0), None, None, None)
    rest = (compiled.run, (7, (1, 1, 0), None, None, None))
    monkeypatch.setattr(CudaLauncher, "profile_scratch_size", 16)
    assert triton_direct._launcher(compiled) == rest
    monkeypatch.setattr(CudaLauncher, "profile_scratch_size", 0)
    monkeypatch.setattr(triton_direct.triton, "__version__", "3.7.0")
    assert triton_direct._launcher(compiled) == rest
