"""Buffers made for several layers at once: as if each had made its own."""

import copy
import pickle

import pytest
import torch
from cache_checks import KIVI, new, randn, same
from torch import Tensor

from kivi import room
from kivi.room import Room
from kivi.steps import Steps


def take(one: Room, kind: int = 256) -> Tensor:
    """Int32 tensors of `kind` bytes, zeroed."""
    made, nothing = one.take("x", kind, lambda n: [torch.zeros(n, kind // 4).int(), None])
    assert nothing is None
    return made


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_the_first_layer_alone_then_the_others_together() -> None:
    shared = Room(6)
    made = [take(shared) for _ in range(8)]
    for i, x in enumerate(made):
        x.fill_(i)
    assert [x.unique().tolist() for x in made] == [[i] for i in range(8)]
    groups = [storage(x) for x in made]
    # Nobody expected the last two.
    assert [groups.count(g) for g in groups] == [1, 5, 5, 5, 5, 5, 1, 1]
    assert all(x.shape == (1, 64) and x.data_ptr() % 64 == 0 for x in made)


def test_no_more_than_so_many_bytes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "AHEAD", 3 * 256)
    shared = Room(8)
    made = [take(shared) for _ in range(8)]
    groups = [storage(x) for x in made]
    assert [groups.count(g) for g in groups] == [1, 3, 3, 3, 3, 3, 3, 1]


def test_what_would_begin_within_a_line_is_made_alone() -> None:
    shared = Room(4)
    held = [take(shared, 200) for _ in range(4)]
    assert len({storage(x) for x in held}) == 4


def test_another_kind_takes_the_place_and_a_copy_has_nothing() -> None:
    shared = Room(4)
    held = [take(shared), take(shared)]
    assert len(shared._stocks["x"].left) == 2
    assert not copy.deepcopy(shared)._stocks and copy.deepcopy(shared).layers == 4
    held.append(take(shared, 512))
    assert held[-1].nbytes == 512 and not shared._stocks["x"].left


def test_layers_of_several_kinds_have_no_more_ahead_than_there_were() -> None:
    shared, kinds = Room(16), [256, 256, 512, 512, 512, 512, 512, 512, 256]
    made = [take(shared, kind) for kind in kinds]
    groups = [storage(x) for x in made]
    assert [groups.count(g) for g in groups] == [1, 1, 1, 1, 2, 2, 2, 2, 1]
    assert len(shared._stocks["x"].left) == 0


def test_layers_that_share_room_do_not_share_tokens() -> None:
    """Against layers of their own; one of them grows, one forgets, one is copied."""
    alike, shapes = Steps(), {"batch": 2, "hkv": 2, "d": 64}
    alike.room(KIVI, None).layers = 4
    with torch.inference_mode():  # buffers outlive it
        layers = [new(**shapes, alike=alike) for _ in range(4)]
        own = [new(**shapes) for _ in range(4)]
        for i, pair in enumerate(zip(layers, own, strict=True)):
            k = randn(2, 2, 1200, 64, seed=i)
            for layer in pair:
                layer.prefill(k, -k)
    assert len({storage(x._pages.pool.pages()[0].words) for x in layers}) == 2
    assert len({storage(x._exact_key) for x in layers}) == 2
    for i, pair in enumerate(zip(layers, own, strict=True)):
        k = randn(2, 2, 700, 64, seed=9 + i)
        for layer in pair:
            if i == 1:
                layer.append(k, k)
            elif i == 2:
                layer.reset()
                layer.prefill(k, -k)
            elif i == 3:
                copy.deepcopy(layer).append(k, k)
    for layer, alone in zip(layers, own, strict=True):
        assert layer.nbytes() == alone.nbytes()
        assert all(map(same, layer.dequantize(), alone.dequantize()))


def test_copies_and_pickles_of_a_layer_take_its_own_bytes() -> None:
    alike = Steps()
    alike.room(KIVI, None).layers = 4
    layers = [new(batch=1, hkv=2, d=64, alike=alike) for _ in range(4)]
    for i, layer in enumerate(layers):
        layer.prefill(randn(1, 2, 700, 64, seed=i), randn(1, 2, 700, 64, seed=9 + i))
    last, own = layers[3], layers[3].nbytes().allocated
    assert last._exact_key.untyped_storage().nbytes() > last._exact_key.nbytes
    for other in (copy.deepcopy(last), pickle.loads(pickle.dumps(last))):
        held = {storage(t): t.untyped_storage().nbytes() for t in other._view().tensors()}
        assert sum(held.values()) < 1.1 * own
        assert all(map(same, other.dequantize(), last.dequantize()))
    both = copy.deepcopy([last, last.fork()])  # a fork's pages are those of its parent still
    pages = [layer._pages.pool.pages()[0].words for layer in both]
    assert pages[0] is pages[1] and storage(pages[0]) != storage(last._pages.pool.pages()[0].words)
