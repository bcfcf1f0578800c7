"""Every mode of `generate`, token for token as with a DynamicCache, all of it over packed pages."""

from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, NEW, TWO_BIT, close, forward, generate, prompt, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kivi.hf import KVCache

SAMPLING = {"do_sample": True, "temperature": 1.2, "top_k": 40}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "beam search": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, **SAMPLING},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "several sequences": {"num_return_sequences": 3, **SAMPLING},
    "guidance": {"guidance_scale": 1.5},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assisted": {"assistant_model": tiny("llama", num_hidden_layers=1)},
    "assisted sampling": {"assistant_model": tiny("llama", num_hidden_layers=1), **SAMPLING},
    "scores": {"output_scores": True, "output_logits": True},
}
ONE_ROW = ("prompt lookup", "assisted", "assisted sampling")


class Streamed(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def run(model: PreTrainedModel, cache: Cache, **options: Any) -> tuple[Any, int]:
    """What `generate` returns, and how many of its forwards had this cache."""
    forwards = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal forwards
        forwards += any(value is cache for value in kwargs.values())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    torch.manual_seed(3)
    out = generate(model, cache, return_dict_in_generate=True, **options)
    hook.remove()
    return out, forwards


def check_packed(cache: KVCache, forwards: int) -> None:
    """Every layer attended over packed pages in every forward."""
    assert forwards > 1
    assert cache.packed_calls == [forwards] * len(cache.layers)
    assert cache.dense_calls == [0] * len(cache.layers)
    assert all(min(layer.cache.packed_lengths()) > 0 for layer in cache.packed_layers)


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens(model: PreTrainedModel, mode: str) -> None:
    """In a growing cache, and where a layer has a sliding window in a static one."""
    padding = 30 if mode not in ONE_ROW and mode != "chunked prefill" else 0
    max_length = 128 if model.config.model_type == "gemma3_text" else None
    inputs = prompt(1 if mode in ONE_ROW else 2, padding=padding)
    if mode == "prompt lookup":  # something to be found
        inputs["input_ids"] = inputs["input_ids"][:, :12].repeat(1, 6)[:, :70]
    options = {**MODES[mode], "inputs": inputs}
    theirs, _ = run(model, DynamicCache(config=model.config), **options)
    cache = KVCache(model, LOSSLESS, max_length=max_length)
    mine, forwards = run(model, cache, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(mine.sequences[:, 70:].unique()) >= 5
    assert mine.past_key_values is cache
    check_packed(cache, forwards)
    # A prompt of 70 in chunks of 16 takes four more; guessed tokens save some.
    most = NEW + 4 * (mode == "chunked prefill") - (mode == "prompt lookup")
    assert forwards == most if mode not in ONE_ROW else forwards <= most
    for a, b in zip(mine.get("logits") or (), theirs.get("logits") or (), strict=True):
        close(a, b)
    rows = len(inputs["input_ids"]) * (MODES[mode].get("num_return_sequences", 1))
    assert mine.sequences.shape == (rows, 70 + NEW)


def test_guidance_with_a_prompt(model: PreTrainedModel) -> None:
    """The unconditional half of guidance keeps a cache of its own."""
    negative = prompt(tokens=9, seed=4)["input_ids"]
    options = {"inputs": prompt(), "guidance_scale": 2.0, "negative_prompt_ids": negative}
    theirs, _ = run(model, DynamicCache(config=model.config), **options)
    cache = KVCache(model, LOSSLESS)
    mine, forwards = run(model, cache, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    check_packed(cache, forwards)
    plain, _ = run(model, KVCache(model, LOSSLESS), inputs=prompt())
    assert not torch.equal(plain.sequences, mine.sequences)


@pytest.mark.parametrize("max_length", [None, 128], ids=["growing", "static"])
def test_streaming(model: PreTrainedModel, max_length: int | None) -> None:
    inputs, streamed = prompt(1), Streamed()
    theirs, _ = run(model, DynamicCache(config=model.config), inputs=inputs)
    cache = KVCache(model, LOSSLESS, max_length=max_length)
    _, forwards = run(model, cache, inputs=inputs, streamer=streamed)
    assert streamed.tokens == theirs.sequences[0].tolist()
    assert streamed.ended
    check_packed(cache, forwards)


@pytest.mark.parametrize("max_length", [None, 200], ids=["growing", "static"])
def test_turns(model: PreTrainedModel, max_length: int | None) -> None:
    """Three turns on one cache, which is cut back into its packed pages between two of them."""
    caches = DynamicCache(config=model.config), KVCache(model, LOSSLESS, max_length=max_length)
    ids, said, forwards = prompt(padding=0)["input_ids"], [], 0
    for turn, cut in enumerate((0, 40, 3)):
        if cut:
            caches[1].crop(-cut)
            ids = ids[:, : int(caches[1].get_seq_length())]
            caches = DynamicCache(config=model.config), caches[1]  # theirs cannot go back
        ids = torch.cat([ids, prompt(tokens=20, seed=turn)["input_ids"]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        said = [run(model, cache, inputs=inputs) for cache in caches]
        assert torch.equal(said[1][0].sequences, said[0][0].sequences)
        ids, forwards = said[0][0].sequences, forwards + said[1][1]
    check_packed(caches[1], forwards)


@pytest.mark.parametrize("max_length", [None, 1250], ids=["growing", "static"])
def test_prefix_is_stored_once(max_length: int | None) -> None:
    """Conversations that fork from one prompt; its full pages stand in memory once."""
    model, ids = tiny("llama"), prompt(1, tokens=1200)["input_ids"]
    cache = KVCache(model, LOSSLESS, max_length=max_length)
    forward(model, cache, ids, logits_to_keep=1)
    pool = cache.packed_layers[0].cache._pages.pool
    before, page = pool.nbytes, pool.page_nbytes
    forks = [cache.fork() for _ in range(4)]
    for seed, fork in enumerate(forks):
        tail = prompt(1, tokens=5, seed=seed)["input_ids"]
        inputs = {"input_ids": torch.cat([ids, tail], 1)}
        theirs, _ = run(model, DynamicCache(config=model.config), inputs=inputs)
        mine, forwards = run(model, fork, inputs=inputs)
        assert torch.equal(mine.sequences, theirs.sequences)
        check_packed(fork, forwards)
    assert cache.get_seq_length() == 1200 and cache.packed_calls == [1, 1]
    rows = [each.packed_layers[0].cache._pages.rows[0] for each in (cache, *forks)]
    assert len({tuple(row[:2]) for row in rows}) == 1  # 1024 tokens in two pages
    assert len({page for row in rows for page in row}) == 2 + 5
    if max_length is None:  # a page for each fork, and a quarter more
        assert pool.nbytes <= before + (4 + 2) * page
    copied = [each.packed_layers[0].cache.nbytes().used for each in (cache, *forks)]
    assert 2 * page + 5 * page < sum(copied) < 5 * 5 * page


@pytest.mark.parametrize("mode", ["greedy", "beam search", "prompt lookup", "chunked prefill"])
@pytest.mark.parametrize("max_length", [None, 1300], ids=["growing", "static"])
def test_sliding_layers_keep_their_window(mode: str, max_length: int | None) -> None:
    """Pages that the window has passed are written again; full layers keep everything."""
    model = tiny("gemma3", max_position_embeddings=2048)
    padding = 30 if mode in ("greedy", "beam search") else 0
    inputs = prompt(1 if mode in ONE_ROW else 2, tokens=1200, padding=padding)
    options = {**MODES[mode], "inputs": inputs}
    if mode == "chunked prefill":
        options["prefill_chunk_size"] = 500
    theirs, _ = run(model, DynamicCache(config=model.config), **options)
    cache = KVCache(model, LOSSLESS, max_length=max_length)
    mine, forwards = run(model, cache, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    check_packed(cache, forwards)
    sliding, full = (layer.cache for layer in cache.packed_layers)
    lost = sliding._pages.forgotten(sliding.packed_lengths())
    assert min(lost) == 512 and full._pages.forgotten(full.packed_lengths())[0] == 0
    rows = sliding.batch_size
    assert len({page for row in sliding._pages.rows for page in row}) <= 2 * rows
    assert sliding.nbytes().allocated < full.nbytes().allocated


def test_a_crop_is_of_all_layers_or_of_none() -> None:
    kinds = ["full_attention", "sliding_attention"]
    model = tiny("gemma3", max_position_embeddings=2048, layer_types=kinds)
    cache = KVCache(model, TWO_BIT)
    forward(model, cache, prompt(tokens=1300)["input_ids"])
    with pytest.raises(ValueError, match="sliding_window=48 has forgotten"):
        cache.crop(-900)
    assert [layer.cache.lengths() for layer in cache.packed_layers] == [[1300, 1300]] * 2
    cache.crop(-128)
    assert [layer.cache.lengths() for layer in cache.packed_layers] == [[1172, 1172]] * 2
