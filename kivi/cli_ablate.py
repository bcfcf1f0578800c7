"""`kivi ablate`: from options to a task, its progress, a table and a report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from kivi import KVQuantizer, LayerCache
from kivi.attention import Impl
from kivi.cli_model import EMBEDDED, LoadedModel, open_model
from kivi.cli_schemes import choose_schemes, fitting
from kivi.evals.ablation import Ablation, Candidate, Failure, Task, ablate
from kivi.evals.attention_error import AttentionInputs, record_attention
from kivi.evals.environment import environment
from kivi.evals.feeding import Cache, check_chunk, check_context, text_windows
from kivi.evals.passkey import PasskeySample, PasskeyTemplate, passkey_batch
from kivi.evals.report import Settings, one_line, write_report
from kivi.evals.rows import COLUMNS, cells, make_row
from kivi.hf import KVCache
from kivi.hf_rope import find_rope
from kivi.spec import check_choice

ATTENTION_TEXTS = 1
"""Texts whose attention is compared; each adds its queries, keys and values to memory."""
WIDE = 100
"""Characters that the table needs with all columns."""
NOT_IF_NARROW = ("bits", "group_size", "attention_error", "fused_kernel")
"""Columns that a narrow terminal leaves to the report."""


@dataclass(frozen=True)
class AblateOptions:
    """The options of `kivi ablate`, as given; None where a default follows from others."""

    out: Path
    model: str = EMBEDDED
    schemes: tuple[str, ...] = ()
    preset: str | None = None
    text: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    impl: str = "auto"
    tokens: int = 4608
    context: int = 1536
    prefill: int | None = None
    chunk: int = 32
    batch_size: int = 8
    seed: int = 0
    passkey: bool = True
    passkey_lengths: tuple[int, ...] = (1024, 2048)
    passkey_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    passkey_samples: int = 3

    def resolved(self) -> AblateOptions:
        """With every default filled in.

        Raises:
            ValueError: for sizes that leave nothing to evaluate, or a folder that cannot be made.
        """
        there = next(place for place in (self.out, *self.out.parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"out={str(self.out)!r} is not allowed; {str(there)!r} is a file")
        prefill = self.context // 2 if self.prefill is None else self.prefill
        check_chunk(self.chunk)
        check_choice("impl", self.impl, get_args(Impl))
        if not 1 <= prefill < self.context:
            raise ValueError(
                f"prefill={prefill} is not allowed; it must be 1 to {self.context - 1} "
                f"at context={self.context}"
            )
        for name in ("tokens", "batch_size", "passkey_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be >= 1")
        return replace(self, prefill=prefill)

    def command(self, labels: list[str]) -> str:
        """A command that repeats the run, every default spelt out."""
        words = ["kivi", "ablate", "--model", self.model]
        words += [word for label in labels for word in ("--scheme", label)]
        words += ["--text", str(self.text)] if self.text else []
        for name in ("device", "dtype", "impl", "tokens", "context", "prefill", "chunk"):
            words += [f"--{name}", str(getattr(self, name))]
        words += ["--batch-size", str(self.batch_size), "--seed", str(self.seed)]
        if not self.passkey:
            return shlex.join([*words, "--no-passkey"])
        words += [w for n in self.passkey_lengths for w in ("--passkey-length", str(n))]
        words += [w for d in self.passkey_depths for w in ("--passkey-depth", f"{d:g}")]
        return shlex.join([*words, "--passkey-samples", str(self.passkey_samples)])


def run_ablate(given: AblateOptions, console: Console, progress_console: Console) -> int:
    """Run an ablation and write its report: data whenever a scheme is through, plots at the end.

    Returns:
        The exit code: 0, 1 if a scheme failed, 130 if interrupted; what was found is written.

    Raises:
        ValueError: for whatever the options don't allow.
    """
    options = given.resolved()
    schemes = choose_schemes(options.preset, options.schemes)
    with progress_console.status("Loading the model"):
        loaded = open_model(options.model, options.device, options.dtype)
        check_context(loaded.model, options.context)
        tokens, text_name = loaded.text_tokens(options.text)
        schemes = fitting(schemes, options.schemes, loaded.head_dim, progress_console)
        task = make_task(loaded, tokens, options, progress_console)
    here, files = environment(loaded.model.device), list[Path]()
    latest: Ablation | None = None

    def write(ablation: Ablation, *, plots: bool = False) -> None:
        nonlocal latest, files
        latest = ablation
        files = write_report(
            options.out,
            ablation,
            [schemes[scores.label] for scores in ablation.schemes],
            settings=_settings(options, loaded, ablation, text_name, list(schemes)),
            environment=here,
            head_dim=loaded.head_dim,
            plots=plots,
        )

    interrupted = False
    try:
        latest = _evaluate(loaded, schemes, task, options.impl, progress_console, write)
    except KeyboardInterrupt:
        interrupted = True
        _say(progress_console, "interrupted: what follows is what was finished")
    if latest is None or not latest.schemes:
        for file in files:  # of schemes that failed later
            file.unlink()
        _say(progress_console, "error: no scheme was evaluated, and no report is written")
        return 130 if interrupted else 1
    rows = [schemes[scores.label] for scores in latest.schemes]
    console.print(result_table(latest, rows, loaded.head_dim, console.width))
    write(latest, plots=True)
    names = ", ".join(file.name for file in files)
    console.print(f"Written to {options.out}: {names}", highlight=False, soft_wrap=True)
    if latest.failed:
        labels = ", ".join(failure.label for failure in latest.failed)
        _say(progress_console, f"error: {len(latest.failed)} of {len(schemes)} failed: {labels}")
    return 130 if interrupted else int(bool(latest.failed))


def _evaluate(
    loaded: LoadedModel,
    schemes: dict[str, KVQuantizer],
    task: Task,
    impl: str,
    console: Console,
    on_result: Callable[[Ablation], None],
) -> Ablation:
    columns = (
        TextColumn("{task.description:<32.32}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    candidates = [make_candidate(loaded, label, scheme, impl) for label, scheme in schemes.items()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=task.work(len(candidates)))

        def on_progress(stage: str, amount: int) -> None:
            progress.update(bar, description=stage, advance=amount)

        def on_failure(failure: Failure) -> None:
            _say(console, f"{failure.label} failed and is left out: {one_line(failure.error)}")

        ablation = ablate(
            loaded.model,
            candidates,
            task,
            on_progress,
            on_failure=on_failure,
            on_result=on_result,
        )
        progress.update(bar, description="done")
    return ablation


def _say(console: Console, line: str) -> None:
    console.print(f"[red]{escape(line)}[/red]", highlight=False, soft_wrap=True)


def make_task(
    loaded: LoadedModel, tokens: Tensor, options: AblateOptions, console: Console
) -> Task:
    """Texts, passkeys and recorded attention of an ablation; notes go to the console.

    Raises:
        ValueError: if the text is too short or the tokenizer takes no passkeys.
    """
    assert options.prefill is not None
    count = -(-options.tokens // (options.context - options.prefill))
    bos: int | None = loaded.tokenizer.bos_token_id
    texts = text_windows(
        tokens, count=count, length=options.context + 1, seed=options.seed, bos=bos
    )
    passkeys = tuple(_passkeys(loaded, tokens, options)) if options.passkey else ()
    attention: tuple[AttentionInputs, ...] = ()
    try:
        attention = tuple(record_attention(loaded.model, texts[:ATTENTION_TEXTS, :-1]))
    except ValueError as error:
        console.print(f"[dim]No attention error: {error}[/dim]")
    return Task(
        texts=texts,
        prefill=options.prefill,
        chunk=options.chunk,
        batch_size=options.batch_size,
        seed=options.seed,
        passkeys=passkeys,
        attention=attention,
    )


def _passkeys(
    loaded: LoadedModel, tokens: Tensor, options: AblateOptions
) -> list[tuple[PasskeySample, ...]]:
    bos = loaded.tokenizer.bos_token_id
    if bos is None:
        raise ValueError("passkeys need a tokenizer with a bos token; use --no-passkey")
    try:
        template = PasskeyTemplate.from_encode(loaded.encode, bos)
    except ValueError as error:
        raise ValueError(f"{error}; use --no-passkey") from error
    batches = []
    for length in options.passkey_lengths:
        check_context(loaded.model, length, "passkey length")
        # All depths of one seed make a batch; several seeds fill it up.
        samples = [
            sample
            for i in range(options.passkey_samples)
            for sample in passkey_batch(
                tokens,
                template,
                length=length,
                depths=options.passkey_depths,
                seed=options.seed + i,
            )
        ]
        size = options.batch_size
        batches += [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]
    return batches


def make_candidate(loaded: LoadedModel, label: str, scheme: KVQuantizer, impl: str) -> Candidate:
    """A scheme with its caches for a model."""
    implementation = cast(Impl, impl)  # as `resolved` found it

    def make_cache() -> Cache:
        return KVCache(loaded.model, scheme, impl=implementation)

    def make_layer(layer_idx: int, x: AttentionInputs) -> LayerCache:
        return scheme.new_layer(
            batch_size=x.k.shape[0],
            num_kv_heads=x.k.shape[1],
            head_dim=x.k.shape[3],
            value_head_dim=x.v.shape[3],
            dtype=x.k.dtype,
            device=x.k.device,
            impl=implementation,
            layer_idx=layer_idx,
            rope=find_rope(loaded.model, layer_idx),
        )

    return Candidate(label, make_cache, make_layer)


def result_table(
    ablation: Ablation, schemes: list[KVQuantizer], head_dim: int, width: int
) -> Table:
    """The scores as a table for a terminal so many characters wide."""
    pairs = zip(ablation.schemes, schemes, strict=True)
    rows = [cells(make_row(scores, scheme, head_dim)) for scores, scheme in pairs]
    exact = ablation.exact_perplexity.estimate
    table = Table(
        title=f"Full precision: perplexity {exact:.3f}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    left_out = () if width >= WIDE else NOT_IF_NARROW
    shown = [(k, h) for k, h in COLUMNS if k not in left_out and any(row[k] for row in rows)]
    for key, heading in shown:
        if key == "scheme":
            table.add_column(heading, overflow="fold", vertical="bottom")
        else:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[key] for key, _ in shown))
    return table


def _settings(
    options: AblateOptions, loaded: LoadedModel, ablation: Ablation, text: str, labels: list[str]
) -> Settings:
    assert options.prefill is not None
    evaluated = ablation.schemes[0].decode.tokens
    return Settings(
        command=options.command(labels),
        model=loaded.name,
        text=text,
        device=str(loaded.model.device),
        dtype=loaded.dtype,
        impl=options.impl,
        context=options.context,
        prefill=options.prefill,
        chunk=options.chunk,
        sequences=evaluated // (options.context - options.prefill),
        batch_size=options.batch_size,
        evaluated_tokens=evaluated,
        seed=options.seed,
        passkey_lengths=options.passkey_lengths if options.passkey else (),
        passkey_depths=options.passkey_depths if options.passkey else (),
        passkey_samples=options.passkey_samples if options.passkey else 0,
    )
