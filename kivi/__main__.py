"""The command line: `kivi ablate`, `schemes`, `tune` and `generate`, or `python -m kivi ...`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="KV-cache quantization for PyTorch: compare schemes on a model, or generate with one.",
)


class Preset(StrEnum):
    """Lists of schemes, see PRESETS in cli_schemes.py."""

    DEFAULT = "default"
    PAPER_AXES = "paper-axes"
    ZOO = "zoo"
    BITS = "bits"
    FLAGSHIP = "flagship"
    GROUP_SIZE = "group-size"


Model = Annotated[
    str, typer.Option(help="Folder or Hugging Face name; 'embedded' is the reference model.")
]
Device = Annotated[str, typer.Option(help="Torch device; 'auto' takes CUDA if there is any.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; 'auto': float32 on CPU, else as stored.")
]
Impl = Annotated[str, typer.Option(help="Implementation: auto, eager, compile, triton.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """A ValueError or a bad file is the user's to mend: one red line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[red]error: {escape(line)}[/red]")
        raise typer.Exit(2) from None


@app.command()
def ablate(
    model: Model = "embedded",
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="A scheme, such as 'kivi:bits=2,group_size=64'. Repeat for more."),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="A list of schemes. Without any --scheme: default."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on; else the embedded held-out text.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("kivi-ablation"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    impl: Impl = "auto",
    tokens: Annotated[
        int, typer.Option(help="Tokens to evaluate, rounded up to sequences.")
    ] = 4608,
    context: Annotated[int, typer.Option(help="Tokens in the cache at a sequence's end.")] = 1536,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of exact prefill.", show_default="half the context")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens fed at a time after the prefill.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of texts, passkeys and confidence intervals.")] = 0,
    passkey: Annotated[bool, typer.Option(help="Whether to test passkey recall.")] = True,
    passkey_length: Annotated[
        list[int], typer.Option(help="Tokens of a passkey prompt. Repeat for more.")
    ] = [1024, 2048],  # noqa: B006
    passkey_depth: Annotated[
        list[float], typer.Option(help="Place of the key, 0 (start) to 1 (end). Repeat for more.")
    ] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006
    passkey_samples: Annotated[int, typer.Option(help="Keys for each length and depth.")] = 3,
) -> None:
    """Compare schemes on a model: perplexity, KL, top-1, passkey recall, bytes.

    Texts are fed in chunks through the quantized cache, after an exact prefill. Writes
    ablation.csv, .json, .md and plots. A scheme that fails is left out, and the exit code is 1.
    """
    with _user_errors():
        from kivi.cli_ablate import AblateOptions, run_ablate

        options = AblateOptions(
            out=out,
            model=model,
            schemes=tuple(scheme or ()),
            preset=preset.value if preset else None,
            text=text,
            device=device,
            dtype=dtype,
            impl=impl,
            tokens=tokens,
            context=context,
            prefill=prefill,
            chunk=chunk,
            batch_size=batch_size,
            seed=seed,
            passkey=passkey,
            passkey_lengths=tuple(passkey_length),
            passkey_depths=tuple(passkey_depth),
            passkey_samples=passkey_samples,
        )
        code = run_ablate(options, Console(), Console(stderr=True))
    raise typer.Exit(code)


@app.command()
def schemes(
    head_dim: Annotated[int, typer.Option(help="Head dimension for bits per element.")] = 128,
) -> None:
    """List all schemes with their options, bits per element and papers."""
    with _user_errors():
        from kivi.cli_schemes import schemes_table

        Console().print(schemes_table(head_dim))


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="File for what is found of each layer.")],
    scheme: Annotated[
        str, typer.Option(help="'kvtuner' (bits), 'oscar_cov' (rotations), 'kvquant' (levels).")
    ] = "kvtuner",
    bits: Annotated[
        float, typer.Option(help="Bits of a code: the mean (kvtuner), or all (kvquant).")
    ] = 3.0,
    model: Model = "embedded",
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; else the embedded held-out text.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens; half are prefill (kvtuner).")] = 1024,
    seed: Annotated[int, typer.Option(help="Where in the text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run a model to find what a scheme wants to know of each layer, and save it as a file."""
    with _user_errors():
        from kivi.cli_tune import run_tune

        run_tune(
            model,
            text,
            out,
            scheme=scheme,
            bits=bits,
            context=context,
            seed=seed,
            device=device,
            dtype=dtype,
            console=Console(),
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: Model = "embedded",
    scheme: Annotated[str, typer.Option(help="Scheme, such as 'kivi:bits=2'.")] = "kivi",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    impl: Impl = "auto",
) -> None:
    """Generate text with a quantized cache, then print tokens/s and the cache's bytes."""
    with _user_errors():
        from kivi.cli_generate import run_generate

        run_generate(
            model,
            prompt,
            scheme,
            max_new_tokens,
            device=device,
            dtype=dtype,
            impl=impl,
            console=Console(soft_wrap=True),
        )


if __name__ == "__main__":
    app()
