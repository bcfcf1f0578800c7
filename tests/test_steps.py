"""Steps that layers share: what one works out holds for all, and what one does stays with it."""

import copy
import random

import pytest
import torch
from cache_checks import KIVI, bits, new, tokens
from one_thread import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from kivi import KVSpec, LayerCache, QuantSpec
from kivi.steps import SLACK, Steps, ring_slots, slots, stretches


@pytest.mark.parametrize(("sinks", "residual"), [(0, 0), (3, 32), (70, 5)])
def test_stretches_are_where_the_columns_go(sinks: int, residual: int) -> None:
    spec = KVSpec(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), residual, sinks)
    ring, apart = ring_slots(spec), set()
    for length in range(3 * ring + sinks):
        for t in (1, 2, 5, SLACK, ring - 1, 2 * ring + 7):
            want = slots(spec, torch.arange(length, length + t)).tolist()
            place = stretches(spec, [length] * 3, t)
            assert place is not None
            found = {c + i: slot + i for c, slot, count in place for i in range(count)}
            assert len(found) == sum(count for _, _, count in place)
            # Of columns with the same slot the last one stays; no sink is anyone else's.
            assert found == {
                column: slot for slot, column in {s: c for c, s in enumerate(want)}.items()
            }
            assert stretches(spec, [length, length, length + 1], t) is None
            apart.add(len(place))
    assert {1, 2} <= apart <= {1, 2, 3}


def act(layer: LayerCache, action: str, seed: int) -> list[torch.Tensor]:
    """One thing that happens to a layer, and what it gives."""
    b = layer.batch_size
    if action in ("step", "two", "many"):
        t = {"step": 1, "two": 2, "many": 40}[action]
        k, v = tokens(layer, t, seed)
        return [layer.decode(torch.cat([k, k], 1), k, v)]
    if action == "ragged":
        valid = torch.arange(9) >= torch.arange(b)[:, None]
        layer.append(*tokens(layer, 9, seed), valid)
    elif action == "select":
        layer.select([(i + 1) % b for i in range(b)])
    elif action == "crop":
        layer.crop(min(7, *layer.lengths()))
    elif action == "reset":
        layer.reset()
    return []


ACTIONS = ["step"] * 6 + ["two", "two", "many", "ragged", "select", "crop", "reset"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("seed", range(4))
def test_layers_that_share_steps_do_what_they_do_alone(seed: int, mode) -> None:
    """Three layers, one of another format; sometimes one of them goes its own way."""
    chance, shared = random.Random(seed), Steps()
    specs = [KIVI, KIVI, KVSpec(None, QuantSpec(2, "token", 16), 5, 1)]
    together, alone = ([new(spec, batch=3, d=32) for spec in specs] for _ in range(2))
    for layer in together:
        layer.steps = shared
    for n in range(60):
        action = chance.choice(ACTIONS)
        which = range(3) if chance.random() < 0.8 else [chance.randrange(3)]
        for i in which:
            with mode() if chance.random() < 0.5 else torch.no_grad():
                for one, other in zip(
                    act(together[i], action, n), act(alone[i], action, n), strict=True
                ):
                    assert torch.equal(one, other)
        if n == 30:
            together = copy.deepcopy(together)
        for one, other in zip(together, alone, strict=True):
            assert one.lengths() == one._length.tolist() == other.lengths()
            assert one.packed_lengths() == one._packed.tolist() == other.packed_lengths()
            if any(one.lengths()):
                pairs = zip(one.dequantize(), other.dequantize(), strict=True)
                assert all(torch.equal(bits(a), bits(b)) for a, b in pairs)


class Names(TorchDispatchMode):
    """The operators that are not views: on a GPU each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.names.append(op._schema.name)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("ragged", [False, True])
def test_one_layer_counts_for_all(ragged: bool) -> None:
    """Besides attention the others only write a key and a value."""
    shared = Steps()
    layers = [new(KIVI, d=32) for _ in range(3)]
    valid = torch.arange(50) >= torch.tensor([[3], [0]]) if ragged else None
    seen = []
    for layer in layers:
        layer.steps = shared
        layer._ops = layer._ops._replace(decode_attention=lambda q, *_: (q, None))
        layer.append(*tokens(layer, 50), valid)
    for layer in layers:
        k, v = tokens(layer, 1)
        with Names() as mode:
            layer.decode(k, k, v)
        seen.append(mode.names)
    write = "aten::index_put_" if ragged else "aten::copy_"
    assert seen[1:] == [[write] * 2] * 2 and len(seen[0]) > 2


@pytest.mark.parametrize("action", ["step", "ragged", "select", "crop", "reset"])
def test_what_one_layer_does_stays_with_it(action: str) -> None:
    shared = Steps()
    layers = [new(KIVI, batch=3, d=32) for _ in range(2)]
    for layer in layers:
        layer.steps = shared
        layer.append(*tokens(layer, 66), torch.arange(66) >= torch.tensor([[9], [0], [40]]))
        layer.append(*tokens(layer, 1))
    one, other = layers
    assert one._length is other._length and one._table is other._table
    table = other._table.clone()
    act(one, action, 7)
    assert torch.equal(other._table, table)
    assert one._length.tolist() == one.lengths() and one._packed.tolist() == one.packed_lengths()
    assert other._length.tolist() == other.lengths() == [58, 67, 27]
    assert other._packed.tolist() == other.packed_lengths() == [0, 32, 0]
