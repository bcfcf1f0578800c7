"""A whole model with each kind of cache: prefill time, decode tokens/s, peak memory, cache bytes.

    python bench/bench_generate.py grid --model llama-3.1-8b --batch 1,8,32 --context 1024,8192 \
        --caches dynamic,static,kivi-2,kivi-2-compiled --out bench/results/generate.json
    python bench/bench_generate.py paper --cap-gb 80 --out bench/results/paper_protocol.json
    python bench/bench_generate.py plot bench/results/generate.json docs/generate.png

Weights are random, shapes are those of the real models. `grid` fills a cache with random keys and
values (a prefill of the whole grid would take hours) and times decode steps; `--prefill` times real
prompts as well. `paper` is the protocol of KIVI (arXiv 2402.02750, section 4.3): 161 tokens in, 338
out, the batch raised until memory ends. Records grow: a row replaces the row of the same case, so
that a grid can be measured in slices. Out of memory is a result, and ends that cache's batches.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from generate_cases import CACHES, MODELS, cache_bytes, compiles, fill, new_cache, new_model
from measure import DEVICE, environment
from rich.console import Console
from transformers import Cache, PreTrainedModel

from kivi.hf_loop import _buffers, _compiled

WARM_UP = 6
console = Console(width=150)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
warnings.filterwarnings("ignore", category=FutureWarning)  # past_key_values has a new name
Row = dict[str, Any]


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Append the seconds that the device takes."""
    sync()
    start = time.perf_counter()
    yield
    sync()
    times.append(time.perf_counter() - start)


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clean() -> None:
    """Give back graphs and memory of the case before."""
    torch._dynamo.reset()
    _compiled.cache_clear()
    _buffers.cache_clear()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


def cap(gigabytes: float | None) -> None:
    """Let the process have so many GB (2**30 bytes) of the device."""
    if gigabytes is not None and DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))


def decoder(
    model: PreTrainedModel, cache: Any, name: str, batch: int, length: int, backend: str
) -> Callable[[int], None]:
    """A function that decodes n tokens greedily, on a compiled step where the cache can."""
    if compiles(name):
        said, at = _buffers((batch, length), torch.device(DEVICE))
        at.zero_()
        step = _compiled(backend)

        def compiled_steps(n: int) -> None:
            for _ in range(n):
                step(model, cache, said, at, 0.0, None)

        return compiled_steps
    token = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)

    def steps(n: int) -> None:
        nonlocal token
        for _ in range(n):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)

    return steps


def prefill(
    model: PreTrainedModel, cache: Cache, batch: int, tokens: int, chunk: int | None
) -> None:
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=DEVICE)
    for part in ids.split(chunk or tokens, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def measure(
    model: PreTrainedModel, name: str, batch: int, context: int, new: int, options: Row
) -> Row:
    """One case of the grid."""
    clean()
    row: Row = {}
    length, times = context + WARM_UP + new + 1, list[float]()
    if options["prefill"]:
        for _ in range(2):  # the first one warms up
            cache = new_cache(name, model, length, options["cache"])
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with timed(times):
                prefill(model, cache, batch, context, options["chunk"])
        row |= {"prefill s": times[-1], "prefill peak GiB": peak_gib()}
        del cache
        clean()
    cache = new_cache(name, model, length, options["cache"])
    fill(cache, model, batch, context)
    run = decoder(model, cache, name, batch, length, options["backend"])
    run(WARM_UP)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with timed(times):
        run(new)
    row |= {"tokens/s": batch * new / times[-1], "ms/step": times[-1] / new * 1e3}
    return row | {"peak GiB": peak_gib(), "cache GiB": cache_bytes(cache) / 2**30}


@torch.no_grad()
def converse(model: PreTrainedModel, name: str, batch: int, context: int, new: int, o: Row) -> Row:
    """One case of the paper's protocol: a prompt and `new` tokens, time of both."""
    clean()
    length, times = context + new, list[float]()
    cache = new_cache(name, model, length, o["cache"])
    for warm in (True, False):
        if not warm and compiles(name):
            cache.reset()
        elif not warm:
            cache = new_cache(name, model, length, o["cache"])
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
        with timed(times):
            prefill(model, cache, batch, context, o["chunk"])
            run = decoder(model, cache, name, batch, length, o["backend"])
            run(WARM_UP if warm else new - 1)
    row = {"tokens/s": batch * new / times[-1], "seconds": times[-1], "peak GiB": peak_gib()}
    return row | {"cache GiB": cache_bytes(cache) / 2**30}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def merge(out: Path | None, rows: list[Row]) -> None:
    """Write rows into a record; a row replaces the one of the same case."""
    if out is None:
        return
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}
    key = ("model", "layers", "batch", "context", "new", "cache", "cap GB")

    def case(row: Row) -> str:
        return json.dumps([row["environment"]["device"], *(row.get(name) for name in key)])

    held = {case(row): row for row in record["rows"]} | {case(row): row for row in rows}
    out.write_text(json.dumps({"rows": list(held.values())}, indent=1) + "\n")


def run_cases(
    one: Callable[..., Row], model_name: str, layers: int | None, names: list[str],
    cases: list[tuple[int, int, int]], cap_gb: float | None, options: Row, out: Path | None,
) -> None:  # fmt: skip
    """Measure cases `(batch, context, new)` with each cache; after a failure smaller ones only."""
    unknown = set(names) - set(CACHES)
    if unknown or model_name not in MODELS:
        raise typer.BadParameter(f"{unknown or model_name}: choose from {CACHES} and {[*MODELS]}")
    cap(cap_gb)
    model, where = new_model(model_name, layers), environment()
    where["command"] += " " + " ".join(sys.argv[1:])
    for name in names:
        failed: list[tuple[int, int]] = []
        for batch, context, new in cases:
            row = {"model": model_name, "layers": model.config.num_hidden_layers, "batch": batch}
            row |= {"context": context, "new": new, "cache": name, "cap GB": cap_gb}
            if any(batch >= b and context >= c for b, c in failed):
                continue
            try:
                row |= one(model, name, batch, context, new, options)
            except torch.OutOfMemoryError:
                failed.append((batch, context))
                row |= {"failed": "out of memory"}
            except ImportError as error:  # quanto or HQQ is not installed
                row |= {"failed": str(error).splitlines()[0]}
                failed.append((0, 0))
            console.print(
                {k: round(x, 3) if isinstance(x, float) else x for k, x in row.items()},
                soft_wrap=True,
            )
            merge(out, [row | {"environment": where}])
    clean()


Caches = Annotated[str, typer.Option(help=f"of {', '.join(CACHES)}")]


@app.command()
def grid(
    model: str = "llama-3.1-8b",
    batch: str = "1,8,32,64",
    context: str = "1024,8192,32768,131072",
    caches: Caches = "dynamic,static,kivi-2,kivi-2-compiled,kivi-4,kivi-4-compiled",
    new: int = 64,
    layers: int | None = None,
    prefill: bool = False,
    chunk: int | None = None,
    cap_gb: float | None = None,
    group_size: int = 32,
    backend: str = "inductor",
    out: Path | None = None,
) -> None:
    """Decode speed and memory over batches and contexts."""
    options = {"prefill": prefill, "chunk": chunk, "backend": backend}
    options["cache"] = {"group_size": group_size}
    cases = [(b, c, new) for c in numbers(context) for b in numbers(batch)]
    run_cases(measure, model, layers, caches.split(","), cases, cap_gb, options, out)


@app.command()
def paper(
    model: str = "llama-2-7b",
    batch: str = "1,8,16,32,64,96,128,192,256,320,384,448,512",
    caches: Caches = "dynamic,static,kivi-2,kivi-2-compiled",
    prompt: int = 161,
    new: int = 338,
    layers: int | None = None,
    cap_gb: float | None = None,
    group_size: int = 32,
    backend: str = "inductor",
    out: Path | None = None,
) -> None:
    """The paper's throughput experiment: batches up to what memory holds."""
    options = {"chunk": None, "backend": backend, "cache": {"group_size": group_size}}
    cases = [(b, prompt, new) for b in numbers(batch)]
    run_cases(converse, model, layers, caches.split(","), cases, cap_gb, options, out)


@app.command()
def plot(record: Path, picture: Path, along: str = "context") -> None:
    """Tokens/s and peak memory along "context" or "batch", for the most frequent other number."""
    from matplotlib.figure import Figure

    rows = [row for row in json.loads(record.read_text())["rows"] if "tokens/s" in row]
    other = "batch" if along == "context" else "context"
    counts = [row[other] for row in rows]
    fixed = max(sorted(set(counts)), key=counts.count)
    rows = sorted((row for row in rows if row[other] == fixed), key=lambda row: int(row[along]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("tokens/s", "peak GiB"), strict=True):
        for name in dict.fromkeys(row["cache"] for row in rows):
            one = [row for row in rows if row["cache"] == name]
            points = [(row[along], row[what] or row["cache GiB"]) for row in one]  # CPU: no peak
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=f"{along} ({other} {fixed})", ylabel=what)
        ticks = sorted({row[along] for row in rows})
        axes.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['environment']['device']}", fontsize=10)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    app()
