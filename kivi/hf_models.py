"""Load a causal language model and its tokenizer for the command line."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load_model(
    source: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        source: a folder or the name of a model on the Hugging Face hub.
        device: where the model goes.
        dtype: of its weights, default the dtype they are stored in.

    Raises:
        ValueError: if there is no such model, naming it.
    """
    quiet: Any = logging
    quiet.disable_progress_bar()  # the caller shows its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model={source!r} can't be loaded: {reason}") from error
    return model.to(device).eval(), tokenizer
