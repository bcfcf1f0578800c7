"""A scheme that drops tokens, in models: sinks and window at positions within the cache."""

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import NEW, close, forward, generate, prompt, state, tiny

from kivi import KVQuantizer
from kivi.hf import KVCache

SCHEME = KVQuantizer.get("streaming_llm", window=30, residual_length=7)
ROTARY = ("llama", "llama3", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss", "falcon")


def wide(name: str, **options):
    """A model of one layer, whose own window is none or longer than the scheme's."""
    types = {"layer_types": ["full_attention"]} if name in ("gemma2", "gemma3", "gpt_oss") else {}
    return tiny(name, num_hidden_layers=1, **types, **options)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("chunks", [(70, 1, 1), (40, 20, 12)], ids=str)
@torch.no_grad()
def test_a_model_of_one_layer_sees_sinks_and_window_as_a_text(name, chunks):
    """What was dropped is as if it had never been there: positions begin at 0 and have no gap."""
    model = wide(name)
    ids = prompt(tokens=72)["input_ids"]
    cache, start = KVCache(model, SCHEME), 0
    for n in chunks:
        logits = forward(model, cache, ids[:, start : start + n])
        start += n
    kept = torch.cat([ids[:, :4], ids[:, -30:]], 1)
    close(logits[:, -1], model(input_ids=kept, use_cache=False).logits[:, -1])
    assert sum(cache.dense_calls) == 0


def test_padding_beams_and_crops_are_rows_as_ever():
    model, inputs = tiny("llama"), prompt(padding=11)
    cache = KVCache(model, SCHEME)
    together = generate(model, cache, inputs)
    alone = inputs["input_ids"][:1, 11:]
    one = generate(model, KVCache(model, SCHEME), {"input_ids": alone})
    assert torch.equal(together[0, 11:], one[0])
    beams = generate(model, KVCache(model, SCHEME), inputs, num_beams=3)
    assert beams.shape == together.shape
    # A crop gives back what the next token sees.
    cache.crop(-5)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.int64)], 1)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -5:]}
    again = forward(model, cache, together[:, -6:-1], **inputs)
    assert torch.equal(again[:, -1].argmax(-1), together[:, -1])


def test_saved_and_loaded_it_still_turns_its_sinks(tmp_path):
    model, ids = tiny("llama"), prompt(tokens=100)["input_ids"]
    cache = KVCache(model, SCHEME)
    forward(model, cache, ids[:, :90])
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors", model)
    assert [str(x) for x in state(again)] == [str(x) for x in state(cache)]
    close(forward(model, again, ids[:, 90:]), forward(model, cache, ids[:, 90:]))


@pytest.mark.compile
@torch.no_grad()
def test_compiled_steps_turn_sinks():
    model, ids = tiny("llama", num_hidden_layers=1), prompt(tokens=60)["input_ids"]
    caches = [KVCache(model, SCHEME, max_length=80) for _ in range(2)]
    for cache in caches:
        forward(model, cache, ids[:, :40])
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for t in range(40, 60):
        one = ids[:, t : t + 1]
        logits = step(input_ids=one, past_key_values=caches[0]).logits
        close(logits, forward(model, caches[1], one))


def test_models_it_cannot_turn_are_refused():
    for name in ("falcon_alibi", "deepseek_v3"):
        with pytest.raises(ValueError, match="'streaming_llm' drops tokens, which takes a rotary"):
            KVCache(tiny(name), SCHEME)
    model, ids = tiny("llama"), prompt()["input_ids"]
    cache = KVCache(model, SCHEME)
    biased = torch.zeros(2, 1, 40, 70)  # a mask of numbers, which only dense attention takes
    forward(model, cache, ids[:, :30])
    with pytest.raises(ValueError, match="window=30 has dropped tokens; this model needs all"):
        forward(model, cache, ids[:, 30:], attention_mask=biased)
    with pytest.raises(ValueError, match="window=0 is not allowed"):
        KVQuantizer.get("streaming_llm", window=0)
