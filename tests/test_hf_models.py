"""Lossless caches give what transformers' own give, token for token, on many architectures."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import MODELS, prompt, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from kivi import KVQuantizer
from kivi.hf import ATTENTION, KVCache

WINDOW_32 = KVQuantizer.get("full_precision", residual_length=32)
NO_WINDOW = KVQuantizer.get("full_precision", residual_length=0, sink_length=3)
NAMES = [name for name in MODELS if name not in ("falcon_alibi", "deepseek_v3")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_num_threads(threads)


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache, **options: Any
) -> tuple[Tensor, Tensor, int]:
    """Sequences `[B, T]`, logits `[B, n, V]` and the number of forwards."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    options = {"max_new_tokens": 30, "do_sample": False, **options}
    hook = model.register_forward_pre_hook(count)
    out = model.generate(
        **inputs,
        **options,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    hook.remove()
    return out.sequences, torch.stack(out.logits, 1), forwards


def check_same(mine: tuple[Tensor, Tensor, int], theirs: tuple[Tensor, Tensor, int]) -> None:
    assert torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-3, atol=1e-3)


def check_packed(cache: KVCache, forwards: int) -> None:
    """Every layer attended over packed pages in every forward."""
    layers = len(cache.layers)
    assert cache.packed_calls == [forwards] * layers
    assert cache.dense_calls == [0] * layers
    for layer in cache.packed_layers:
        assert min(layer.cache.packed_lengths()) > 0


def check_varied(generated: tuple[Tensor, Tensor, int]) -> None:
    """The model says many things and is sure of them: equal tokens mean something."""
    tokens, logits, _ = generated
    assert len(tokens[:, -30:].unique()) >= 10
    assert logits.std() > 0.3


def more(inputs: dict[str, Tensor], sequences: Tensor, tokens: int) -> dict[str, Tensor]:
    """The inputs of a second turn: all that was said, and a new prompt."""
    ids = torch.cat([sequences, prompt(len(sequences), tokens, seed=1)["input_ids"]], 1)
    mask = inputs["attention_mask"]
    return {
        "input_ids": ids,
        "attention_mask": torch.cat(
            [mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1
        ),
    }


# Second turns of more and of fewer tokens than fit into the exact window at once.
@pytest.mark.parametrize(
    ("padding", "max_length", "second"), [(30, None, 40), (0, 200, 9)], ids=["padded", "static"]
)
@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(name: str, padding: int, max_length: int | None, second: int) -> None:
    model, inputs = tiny(name), prompt(padding=padding)
    reference = DynamicCache(config=model.config)
    theirs = generate(model, inputs, reference)
    check_varied(theirs)
    inputs_2 = more(inputs, theirs[0], second)
    theirs_2 = generate(model, inputs_2, reference, max_new_tokens=20)
    for scheme in (WINDOW_32, NO_WINDOW):
        cache = KVCache(model, scheme, max_length=max_length)
        mine = generate(model, inputs, cache)
        check_same(mine, theirs)
        check_packed(cache, mine[2])
        mine_2 = generate(model, inputs_2, cache, max_new_tokens=20)
        check_same(mine_2, theirs_2)
        check_packed(cache, mine[2] + mine_2[2])


@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "falcon"])
def test_same_samples(name: str, max_length: int | None) -> None:
    model, inputs = tiny(name), prompt(padding=30)
    cache = KVCache(model, WINDOW_32, max_length=max_length)
    results = []
    for one in (DynamicCache(config=model.config), cache):
        torch.manual_seed(3)
        results.append(generate(model, inputs, one, do_sample=True, temperature=1.5))
    check_same(results[1], results[0])
    check_packed(cache, 30)
    assert len(results[0][0][:, 70:].unique()) > 15


@pytest.mark.parametrize("name", NAMES)
def test_two_bits_change_logits(name: str) -> None:
    model, inputs = tiny(name), prompt()
    exact = generate(model, inputs, KVCache(model, WINDOW_32), max_new_tokens=8)
    cache = KVCache(model, "kivi", bits=2, residual_length=0)
    packed = generate(model, inputs, cache, max_new_tokens=8)
    check_packed(cache, 8)
    assert packed[1].isfinite().all()
    # The prompt attends to exact keys; the next token is the first that reads what was packed.
    torch.testing.assert_close(packed[1][:, 0], exact[1][:, 0], rtol=1e-4, atol=1e-4)
    assert (packed[1][:, 1] - exact[1][:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("scheme", [WINDOW_32, KVQuantizer.get("kivi", residual_length=16)])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "falcon"])
def test_padded_rows_as_alone(name: str, scheme: KVQuantizer) -> None:
    """A row of a left-padded batch is packed and attended to as it is without the others."""
    model, inputs = tiny(name), prompt(padding=30)
    together = KVCache(model, scheme)
    both = generate(model, inputs, together, max_new_tokens=16)
    for row, padding in enumerate((30, 0)):
        alone = {k: x[row : row + 1, padding:] for k, x in inputs.items()}
        cache = KVCache(model, scheme)
        one = generate(model, alone, cache, max_new_tokens=16)
        assert torch.equal(one[0][0], both[0][row, padding:])
        torch.testing.assert_close(one[1][0], both[1][row], rtol=1e-3, atol=1e-3)
        for a, b in zip(cache.packed_layers, together.packed_layers, strict=True):
            assert a.cache.lengths() == b.cache.lengths()[row : row + 1]
            assert a.cache.packed_lengths() == b.cache.packed_lengths()[row : row + 1]


def outputs(
    model: PreTrainedModel, inputs: dict[str, Tensor], kind: str
) -> tuple[Tensor, list[Tensor | None]]:
    """Logits and gradients of a forward with "none", "dynamic" or "static" cache, or training."""
    valid = inputs["attention_mask"].bool()
    model.train(kind == "training")
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    cache: Cache | None = None
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=100)
    logits = model(**inputs, past_key_values=cache, use_cache=cache is not None).logits
    if cache is not None:  # and a step after the prompt
        ids, mask = torch.full((2, 1), 5), inputs["attention_mask"]
        following = {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(ids)], 1)}
        with torch.no_grad():
            last = model(**following, past_key_values=cache).logits
        return torch.cat([logits[valid], last[:, -1]]).detach(), []
    logits[valid].square().mean().backward()
    return logits[valid].detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["none", "training", "dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 30])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_other_caches(name: str, padding: int, kind: str) -> None:
    """A model whose attention KVCache has set serves other caches, none, and training."""
    dropout = {"attention_dropout": 0.3} if kind == "training" else {}
    model, inputs = tiny(name, **dropout), prompt(padding=padding)
    logits, gradients = outputs(model, inputs, kind)
    KVCache(model, WINDOW_32)
    assert model.config._attn_implementation == ATTENTION
    mine, my_gradients = outputs(model, inputs, kind)
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(my_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
