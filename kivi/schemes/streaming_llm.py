"""StreamingLLM (2309.17453): attention sinks and a window of recent tokens; the rest is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from kivi.quantizer import KVQuantizer
from kivi.spec import KVSpec


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(KVQuantizer, name="streaming_llm", paper="2309.17453"):
    """A rolling cache of 4 sinks and 1020 recent tokens, nothing quantized (section 3.2, table 1).

    A query sees the sinks, itself and the `window - 1` tokens before it, at their positions within
    the cache. That holds in a prompt as well, as if it came token by token. What is dropped frees
    its page as a whole.
    """

    window: int = 1020
    sink_length: int = 4
    residual_length: int = 128

    def spec(self, layer_idx: int | None = None) -> KVSpec:
        """See KVQuantizer.spec."""
        return KVSpec(None, None, self.residual_length, self.sink_length, self.window)
