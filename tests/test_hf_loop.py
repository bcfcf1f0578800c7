"""The plain decode loop says what `generate` says, in one graph."""

from typing import Any

import pytest
import torch
from one_thread import one_thread  # noqa: F401
from tiny_models import LOSSLESS, TWO_BIT, generate, prompt, tiny
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from kivi.hf import KVCache
from kivi.hf_loop import generate_loop


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 20}


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_same_tokens_as_generate(model: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs, caches = prompt(), [KVCache(model, TWO_BIT, max_length=200) for _ in range(2)]
    torch.manual_seed(3)
    theirs = generate(model, caches[0], inputs, do_sample=bool(options), **options)[:, 70:]
    torch.manual_seed(3)
    mine = generate_loop(model, caches[1], inputs["input_ids"], 24, backend=None, **options)
    assert torch.equal(mine, theirs)
    assert len(mine.unique()) > 10
    assert caches[1].packed_calls == [24, 24] and caches[1].dense_calls == [0, 0]
    # A second turn: the last token was said, but the cache has not seen it.
    turn = torch.cat([mine[:, -1:], prompt(tokens=9, seed=1)["input_ids"]], 1)
    ids = torch.cat([inputs["input_ids"], mine, turn[:, 1:]], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = generate(model, caches[0], again)[:, ids.shape[1] :]
    assert torch.equal(generate_loop(model, caches[1], turn, 24, backend=None), theirs)


@pytest.mark.compile
def test_one_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    model, inputs = tiny("llama", num_hidden_layers=1), prompt()
    theirs = generate(model, KVCache(model, LOSSLESS), inputs, max_new_tokens=40)[:, 70:]
    for _ in range(2):
        cache = KVCache(model, LOSSLESS, max_length=128)
        mine = generate_loop(model, cache, inputs["input_ids"], 40, backend="aot_eager")
        assert torch.equal(mine, theirs)
        assert cache.packed_calls == [1]  # the prompt; all steps ran in a graph
        cache.reset()
        mine = generate_loop(model, cache, inputs["input_ids"], 40, backend="aot_eager")
        assert torch.equal(mine, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_wrong_arguments() -> None:
    model, ids = tiny("llama"), prompt()["input_ids"]
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": None}, "temperature=None"),
        ({"backend": "inductr"}, "backend='inductr' is not allowed; choose from .*'inductor'"),
        ({"input_ids": ids[0]}, r"input_ids has shape \(70,\)"),
        ({"input_ids": ids[:, :0]}, r"input_ids has shape \(2, 0\)"),
        ({"max_new_tokens": 60}, "max_length=128 is not allowed; it must be >= 129"),
    ):
        cache = KVCache(model, LOSSLESS, max_length=128)
        with pytest.raises(ValueError, match=message):
            given = {"input_ids": ids, "max_new_tokens": 5, "backend": None, **options}
            generate_loop(model, cache, **given)
        assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="max_length=None"):
        generate_loop(model, KVCache(model, LOSSLESS), ids, 5)
