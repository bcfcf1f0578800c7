"""The decode steps that `bench_generate.py` times: eager, or compiled and replayed as a CUDA graph.

A model has 32 layers alike, and torch.compile takes a minute or more over all of them, for each
batch and length anew. So by default one layer is compiled for all ("layer"), the rest of the
model's own forward stays as it is, and one CUDA graph takes it all. "whole" is what
`kivi.hf_loop.generate_loop` does: the whole step compiled, with inductor's own CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from measure import DEVICE
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kivi.hf_loop import _buffers, _compiled, _step

How = Literal["eager", "layer", "whole"]
WARM_UP = 6
"""Steps that a decoder's first call must take at least: it compiles and captures in them."""
COMPILING = 3


@contextmanager
def decoder(
    model: PreTrainedModel, cache: Any, batch: int, length: int, how: How, backend: str
) -> Iterator[Callable[[int], None]]:
    """A function that decodes n tokens greedily after what a cache holds, at most `length`."""
    if how == "eager":
        token = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)

        def steps(n: int) -> None:
            nonlocal token
            for _ in range(n):
                token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

        yield steps
        return
    said, at = _buffers((batch, length), torch.device(DEVICE))
    at.zero_()
    arguments = (model, cache, said, at, 0.0, None)
    if how == "whole":
        yield partial(_repeat, partial(_compiled(backend), *arguments))
        return
    replay: Callable[[], None] | None = None

    def compiled_steps(n: int) -> None:
        nonlocal replay
        if replay is None:
            replay = _captured(partial(_step, *arguments))
            n -= COMPILING
        _repeat(replay, n)

    with _layers_alike(model, cache, backend):
        yield compiled_steps


def _repeat(step: Callable[[], None], n: int) -> None:
    for _ in range(n):
        step()


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Run a step COMPILING times, then make a CUDA graph of it; without a GPU the step itself."""
    if DEVICE != "cuda":
        _repeat(step, COMPILING)
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _repeat(step, COMPILING)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


@contextmanager
def _layers_alike(model: Any, cache: Any, backend: str) -> Iterator[None]:
    """Single tokens go through decoder layers that share compiled code.

    What tells one layer from another to torch.compile is hidden from it: the layer's number, and
    the identity of tensors that are marked static (the CUDA graph needs no such mark).
    """
    block = torch.compile(_decoder_layer, fullgraph=True, dynamic=False, backend=backend)
    _unmark(cache.layers, set())
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = 0
        layer.forward = partial(_forward, block, layer, cache, Cache(layers=[cache.layers[i]]))
    try:
        yield
    finally:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
            del layer.forward


def _decoder_layer(layer: Any, *args: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *args, **named)


def _forward(
    block: Callable[..., Any], layer: Any, whole: Any, own: Any, hidden: Tensor, **named: Any
) -> Any:
    """A decoder layer's forward with a cache of this one layer in place of the whole one."""
    named = {name: own if value is whole else value for name, value in named.items()}
    return (block if hidden.shape[1] == 1 else _decoder_layer)(layer, hidden, **named)


def _unmark(x: Any, seen: set[int]) -> None:
    if id(x) in seen:
        return
    seen.add(id(x))
    ours = type(x).__module__.partition(".")[0] in ("kivi", "transformers")
    if isinstance(x, Tensor):
        x.__dict__.pop("_dynamo_static_input_type", None)
    elif isinstance(x, dict | list | tuple):
        for part in x.values() if isinstance(x, dict) else x:
            _unmark(part, seen)
    elif ours and hasattr(x, "__dict__"):
        _unmark(vars(x), seen)
