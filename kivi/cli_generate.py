"""`kivi generate`: text from a model with a quantized cache, as it comes."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from kivi.attention import Impl
from kivi.cli_model import open_model
from kivi.cli_schemes import parse_scheme
from kivi.evals.feeding import cache_size, check_context
from kivi.evals.rows import megabytes
from kivi.hf import KVCache


class ConsoleStreamer:
    """What `generate` hands tokens to: prints them as soon as they are whole characters."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.ids: list[int] = []
        self.printed = ""
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt (once), then each new token."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character is to come
            self._print(text)

    def end(self) -> None:
        """Print what is left."""
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        self.console.print()

    def _print(self, text: str) -> None:
        self.console.out(text[len(self.printed) :], end="", highlight=False)
        self.console.file.flush()
        self.printed = text


@torch.inference_mode()
def run_generate(
    model: str,
    prompt: str,
    scheme_text: str,
    max_new_tokens: int,
    *,
    device: str,
    dtype: str,
    impl: str,
    console: Console,
) -> None:
    """Generate greedily, stream the text, then print the speed and the cache's size.

    Raises:
        ValueError: for whatever the arguments don't allow.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed; it must be at least 1")
    scheme = parse_scheme(scheme_text)
    loaded = open_model(model, device, dtype)
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt is empty; give at least one token")
    length = inputs["input_ids"].shape[1] + max_new_tokens
    check_context(loaded.model, length, "prompt + max_new_tokens")
    cache = KVCache(loaded.model, scheme, impl=cast(Impl, impl))
    streamer = ConsoleStreamer(loaded.tokenizer, console)
    console.out(prompt, end="", style="dim", highlight=False)
    loaded.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    size, count = cache_size(cache), len(streamer.times)
    # The first token comes out of the prefill; what is timed is decoding.
    seconds = streamer.times[-1] - streamer.times[0]
    speed = f"{(count - 1) / seconds:.1f} tokens/s decoding" if count > 1 else "no token decoded"
    console.print(
        f"[bold]{count} tokens, {speed}, cache {megabytes(size.allocated)} MiB allocated, "
        f"{megabytes(size.used)} MiB used[/bold] ({scheme_text}, "
        f"{scheme.bits_per_element(loaded.head_dim):.2f} bits per element)",
        highlight=False,
    )
