"""`kivi tune`: what a scheme wants to know of each layer of a model, saved as a small file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from kivi import KVQuantizer, LayerCache
from kivi.cli_levels import write_levels
from kivi.cli_model import open_model
from kivi.evals.attention_error import AttentionInputs, MakeLayer, record_attention
from kivi.evals.feeding import check_context, text_windows
from kivi.evals.rotations import attention_rotations
from kivi.evals.tuning import Pair, choose_pairs, sensitivities
from kivi.spec import check_choice


def run_tune(
    model: str,
    text: Path | None,
    out: Path,
    *,
    scheme: str,
    bits: float,
    context: int,
    seed: int,
    device: str,
    dtype: str,
    console: Console,
) -> None:
    """Measure every layer and write the file that the scheme reads.

    Raises:
        ValueError: for a scheme that is not tuned, a file that cannot be written, a context of
            which too little is packed, a model whose attention cannot be recorded, too short a
            text, or bits that are not allowed.
    """
    check_choice("scheme", scheme, ("kvtuner", "oscar_cov", "kvquant"))
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out={str(out)!r} is not allowed; it must be a file in a folder there is")
    spec = KVQuantizer.get("kvtuner").spec()
    least = 2 * (spec.sink_length + spec.residual_length + spec.unit)
    # The exact window would hold all of the prefill: no error anywhere.
    if scheme == "kvtuner" and context < least:
        raise ValueError(f"context={context} is not allowed; it must be >= {least}")
    loaded = open_model(model, device, dtype)
    check_context(loaded.model, context)
    tokens, _ = loaded.text_tokens(text)
    bos: int | None = loaded.tokenizer.bos_token_id
    texts = text_windows(tokens, count=1, length=context, seed=seed, bos=bos)
    if scheme == "kvquant":
        layers = write_levels(out, loaded, texts, int(bits) if bits.is_integer() else bits)
        console.print(f"{layers} layers, levels of keys and values")
    elif scheme == "kvtuner":
        inputs = record_attention(loaded.model, texts)
        _write_bits(out, loaded.name, inputs, bits, context // 2, console)
    else:
        inputs = record_attention(loaded.model, texts)
        both = [attention_rotations(x) for x in inputs]
        named = {f"key.{i}": key for i, (key, _) in enumerate(both)}
        save_file(named | {f"value.{i}": value for i, (_, value) in enumerate(both)}, out)
        console.print(f"{len(both)} layers, rotations of keys and values")
    console.print(f'Written to {out}: use it as --scheme "{scheme}:file={out}"', soft_wrap=True)


def _write_bits(
    out: Path,
    model: str,
    inputs: list[AttentionInputs],
    bits: float,
    prefill: int,
    console: Console,
) -> None:
    """A pair of widths for each layer, chosen by its attention error."""

    def make_layer(pair: Pair) -> MakeLayer:
        scheme = KVQuantizer.get("kvtuner", key_bits=pair[0], value_bits=pair[1])

        def make(layer_idx: int, x: AttentionInputs) -> LayerCache:
            return scheme.new_layer(
                batch_size=1,
                num_kv_heads=x.k.shape[1],
                head_dim=x.k.shape[3],
                value_head_dim=x.v.shape[3],
                dtype=x.k.dtype,
                device=x.k.device,
            )

        return make

    errors = sensitivities(inputs, make_layer, prefill=prefill)
    chosen = choose_pairs(errors, bits)
    document = {
        "layers": chosen,
        "model": model,
        "attention_error": [own[pair] for own, pair in zip(errors, chosen, strict=True)],
    }
    out.write_text(json.dumps(document) + "\n", encoding="utf-8")
    for i, (own, pair) in enumerate(zip(errors, chosen, strict=True)):
        console.print(f"layer {i}: keys {pair[0]} bit, values {pair[1]} bit, error {own[pair]:.2%}")
