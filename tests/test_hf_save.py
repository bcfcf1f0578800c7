"""Caches in files: what is written comes back, and what is damaged does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import LOSSLESS, TWO_BIT, forward, generate, prompt, state, tiny
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from kivi import KVQuantizer
from kivi.hf import ATTENTION, KVCache

PER_LAYER = {
    "default": "int8",
    -1: KVQuantizer.get("kivi", bits=3, residual_length=40, sink_length=3),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("gemma3", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def filled(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two rows, in a file."""
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    cache = KVCache(model, TWO_BIT)
    generate(model, cache, prompt(tokens=600, padding=30), max_new_tokens=3)
    cache.save(path)
    return path


@pytest.mark.parametrize("max_length", [None, 1300], ids=["growing", "static"])
@pytest.mark.parametrize("scheme", [LOSSLESS, TWO_BIT, PER_LAYER], ids=["lossless", "2 bit", "two"])
def test_goes_on_from_a_file(
    model: PreTrainedModel, scheme: Any, max_length: int | None, tmp_path: Path
) -> None:
    """Token for token and bit for bit, padding and a passed window included."""
    inputs, path = prompt(tokens=1200, padding=30), tmp_path / "cache.safetensors"
    cache = KVCache(model, scheme, max_length=max_length)
    ids = generate(model, cache, inputs, max_new_tokens=5)
    cache.save(path)
    loaded = KVCache.load(path, model)
    assert loaded.schemes == cache.schemes
    assert loaded.get_max_length() == cache.get_max_length()
    torch.testing.assert_close(state(loaded), state(cache), rtol=0, atol=0)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.int64)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    theirs, mine = (generate(model, each, turn) for each in (cache, loaded))
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(state(loaded), state(cache), rtol=0, atol=0)
    assert loaded.dense_calls == [0, 0]
    for each in (cache, loaded):  # what the window passed is known to be gone
        with pytest.raises(ValueError, match="has forgotten"):
            each.crop(-1000)


def test_padding_that_layers_share(tmp_path: Path) -> None:
    """All layers read the same mask where none has a window."""
    model, inputs = tiny("llama"), prompt(tokens=60, padding=7)
    cache = KVCache(model, TWO_BIT)
    ids = generate(model, cache, inputs, max_new_tokens=3)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors", model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    theirs, mine = (generate(model, each, turn) for each in (cache, loaded))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("max_length", [None, 1150], ids=["growing", "static"])
def test_shared_pages_are_written_once(max_length: int | None, tmp_path: Path) -> None:
    model = tiny("llama", max_position_embeddings=2048)
    cache, sizes, pages = KVCache(model, LOSSLESS, max_length=max_length), [], []
    forward(model, cache, prompt(1, tokens=1100)["input_ids"], logits_to_keep=1)
    for repeats in (1, 4):
        cache.batch_repeat_interleave(repeats)
        path = tmp_path / f"{repeats}.safetensors"
        cache.save(path)
        sizes.append(path.stat().st_size)
        loaded = KVCache.load(path, model)
        ids = torch.arange(3, 3 + repeats)[:, None]
        mine, theirs = forward(model, loaded, ids), forward(model, cache.fork(), ids)
        assert torch.equal(mine, theirs)
        pages.append({p for row in loaded.packed_layers[0].cache._pages.rows for p in row})
    page = cache.packed_layers[0].cache._pages.pool.page_nbytes
    exact = cache.packed_layers[0].cache._exact_key[0].nbytes * 2
    # Three more rows in two layers: a page that is still written and exact slots for each.
    assert sizes[1] - sizes[0] < 2 * 3 * (page + exact) + 4000
    if max_length is None:  # and once in memory, while no row has a page of its own anyway
        assert (len(pages[0]), len(pages[1])) == (3, 2 + 4)


def test_empty(model: PreTrainedModel, tmp_path: Path) -> None:
    path, inputs = tmp_path / "empty.safetensors", prompt()
    KVCache(model, LOSSLESS, max_length=128).save(path)
    loaded = KVCache.load(path, model)
    assert (loaded.get_seq_length(), loaded.get_max_length()) == (0, 128)
    expected = generate(model, KVCache(model, LOSSLESS), inputs)
    assert torch.equal(generate(model, loaded, inputs), expected)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write a file of safetensors again with other metadata or tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(bytes(content))


def other_words(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["0.key_words"][0, 0, 0, 0, 0] += 1


def other_length(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    metadata["cache"] = metadata["cache"].replace("572", "571")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "damaged or no safetensors"),
    "text": (lambda path: path.write_text("not a cache at all"), "damaged or no safetensors"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:20_000]), "damaged"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"12345678"), "damaged"),
    "a bit at the end": (lambda path: flip(path, 1), "checksum"),
    "a bit in the middle": (lambda path: flip(path, 0.5), "checksum"),
    "other numbers": (lambda path: rewritten(path, other_words), "checksum"),
    "other counters": (lambda path: rewritten(path, other_length), "checksum"),
    "a tensor less": (lambda path: rewritten(path, lambda m, t: t.pop("1.value_zero")), "checksum"),
    "foreign": (lambda path: save_file({"x": torch.ones(3)}, path), "not a saved kivi.KVCache"),
    "later": (lambda path: rewritten(path, lambda m, t: m.update(version="2")), "version 2; .* 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(
    model: PreTrainedModel, filled: Path, name: str, tmp_path: Path
) -> None:
    path, (damage, message) = tmp_path / "cache.safetensors", DAMAGE[name]
    path.write_bytes(filled.read_bytes())
    assert KVCache.load(path, model).get_seq_length() == 602
    damage(path)
    untouched = tiny("gemma3")
    with pytest.raises(ValueError, match=message):
        KVCache.load(path, untouched)
    assert untouched.config._attn_implementation != ATTENTION


@pytest.mark.parametrize("name", KVQuantizer.available())
def test_a_cache_of_any_scheme_comes_back(name: str, tmp_path: Path) -> None:
    """Formats of their own included: their bytes are read by the scheme that the file names."""
    model, inputs = tiny("llama", head_dim=32), prompt(tokens=250)
    cache = KVCache(model, name)
    forward(model, cache, inputs["input_ids"])
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVCache.load(tmp_path / "cache.safetensors", model)
    torch.testing.assert_close(state(loaded), state(cache), rtol=0, atol=0)
    more = prompt(tokens=3, seed=1)["input_ids"]
    assert torch.equal(forward(model, loaded, more), forward(model, cache, more))


def test_other_models_are_refused(filled: Path) -> None:
    with pytest.raises(ValueError, match=r"another model: \{.*'model_type': 'gemma3_text'"):
        KVCache.load(filled, tiny("llama"))
    with pytest.raises(ValueError, match=r"another model: \{'sliding_window': 48\}"):
        KVCache.load(filled, tiny("gemma3", sliding_window=40))


def test_other_schemes_are_refused(
    model: PreTrainedModel, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheme that has become another one since would read its pages as what they are not."""
    kind = type(TWO_BIT)
    other = KVQuantizer.get("kivi", bits=4).spec()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "spec", lambda self, layer_idx=None: other)
        with pytest.raises(ValueError, match="'kivi' of another release"):
            KVCache.load(filled, model)
    monkeypatch.setattr(kind, "name", "mine")
    cache = KVCache(model, TWO_BIT)
    cache.save(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="unknown scheme: 'mine'"):
        KVCache.load(tmp_path / "mine.safetensors", model)


def test_a_failed_save_keeps_the_old_file(
    model: PreTrainedModel, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(filled.read_bytes())
    cache = KVCache(model, TWO_BIT)

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("kivi.hf_save.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == filled.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        KVCache.load(tmp_path / "nothing.safetensors", model)


def test_layers_that_cannot_be_saved(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Lfm2Config(**shape, **heads, layer_types=["conv", "full_attention"])
    with pytest.warns(UserWarning):
        cache = KVCache(Lfm2ForCausalLM(config), TWO_BIT)
    with pytest.raises(ValueError, match=r"LinearAttentionLayer.* cannot be saved"):
        cache.save(tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_description_is_plain(filled: Path) -> None:
    """Other programs can read the file: its metadata says what the tensors are."""
    with safe_open(filled, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    cache = json.loads(metadata["cache"])
    assert (metadata["format"], metadata["version"]) == ("kivi.KVCache", "1")
    assert cache["layers"][0]["lengths"] == [572, 602]
    assert cache["layers"][0]["spec"]["key"]["bits"] == 2
    assert {"0.key_words", "0.key_scale", "1.value_zero", "1.exact_key", "1.padding_0"} <= names
