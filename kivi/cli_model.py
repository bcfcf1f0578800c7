"""The model under test: its place, its tokenizer and its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi.hf_models import load_model

REFERENCE = Path(__file__).parent / "evals" / "reference"
"""The embedded reference model: a transformers folder with a held-out text."""
EMBEDDED = "embedded"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with what reports say about it."""

    model: Any
    tokenizer: Any
    name: str
    dtype: str

    @property
    def head_dim(self) -> int:
        """Head dimension of the keys."""
        config = self.model.config.get_text_config()
        size: int | None = getattr(config, "head_dim", None)
        return size or config.hidden_size // config.num_attention_heads

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def text_tokens(self, path: Path | None) -> tuple[Tensor, str]:
        """Ids `[N]` of a text file, or of the embedded held-out text, and its name in reports.

        Raises:
            ValueError: if the file can't be read.
        """
        source = REFERENCE / "heldout.txt" if path is None else path
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text={str(source)!r} can't be read: {error}") from error
        return torch.tensor(
            self.encode(text)
        ), "embedded held-out text" if path is None else source.name


def open_model(source: str, device: str, dtype: str) -> LoadedModel:
    """Load a model.

    Args:
        source: "embedded", a folder or a name on the Hugging Face hub.
        device: "auto" (CUDA if there is any) or a torch device.
        dtype: "auto" (float32 on CPU, else as stored) or one of DTYPES.

    Raises:
        ValueError: for an unknown device, dtype or model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed; choose from auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} can't be used: {reason}") from error
    chosen = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else None)
    folder = str(REFERENCE) if source == EMBEDDED else source
    model, tokenizer = load_model(folder, device=place, dtype=chosen)
    return LoadedModel(model, tokenizer, source, str(model.dtype).removeprefix("torch."))
