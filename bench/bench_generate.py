"""A whole model with each kind of cache: prefill time, decode tokens/s, peak memory, cache bytes.

    python bench/bench_generate.py grid --out bench/results/generate.json
    python bench/bench_generate.py grid --cases 1x131072 --caches kivi-2 --cap-gb 24 --prefill \
        --chunk 2048 --out bench/results/generate.json
    python bench/bench_generate.py paper --cap-gb 80 --out bench/results/paper_protocol.json
    python bench/bench_generate.py plot bench/results/generate.json docs/generate.png

Weights are random, shapes are those of the real models. `grid` fills a cache with random keys and
values (a prefill of the whole grid would take hours) and times decode steps; with `--prefill` real
prompts fill it, and are timed as well. `paper` is the protocol of KIVI (arXiv 2402.02750, section
4.3): 161 tokens in, 338 out, the batch raised until memory ends.

Every case stands alone: what fails is a result, gives its memory back, and its row is written at
once. `--seconds` ends a slice in time and says what it left out; a record grows slice by slice, a
row replacing the row of the same case.
"""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import generate_record
import torch
import typer
from generate_cases import MODELS, cache_bytes, check_cache, compiles, fill, new_cache, new_model
from generate_record import Row, brief, merge
from generate_steps import WARM_UP, How, decoder
from measure import DEVICE, environment
from transformers import Cache, PreTrainedModel

from kivi.hf_loop import _buffers, _compiled

started = time.monotonic()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
warnings.filterwarnings("ignore", category=FutureWarning)  # past_key_values has a new name


SHORT_PREFILLS = 9
"""Prompts that are timed, while they take less than half a second each; the median counts."""
LEAST = 5.0
"""Seconds that must be left to start a case; what takes longer is cut off."""


class OutOfTime(BaseException):
    """No Exception: torch.compile would take one for a failure of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what takes longer."""

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


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


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


def cap(gigabytes: float | None) -> None:
    """Let the process have so many GB (2**30 bytes) of the device."""
    if gigabytes is not None and DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))


def prefill(
    model: PreTrainedModel, cache: Cache, batch: int, tokens: int, chunk: int | None
) -> None:
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=DEVICE)
    for part in ids.split(chunk or tokens, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


def how_to(name: str, options: Row) -> How:
    return options["compile"] if compiles(name) else "eager"


@torch.no_grad()
def measure(model: PreTrainedModel, name: str, batch: int, context: int, new: int, o: Row) -> Row:
    """One case of the grid."""
    row: Row = {}
    length, times, chunk = context + WARM_UP + new + 1, list[float](), o["chunk"]
    if o["prefill"]:
        warm = new_cache(name, model, length, o["cache"])
        prefill(model, warm, batch, min(context, 2 * chunk if chunk else context), chunk)
        del warm
        gc.collect()
        reset_peak()
        # Short ones are the host's, which is now and then twice as slow.
        while not times or (len(times) < SHORT_PREFILLS and sum(times) < SHORT_PREFILLS / 2):
            cache = None
            gc.collect()
            cache = new_cache(name, model, length, o["cache"])
            with timed(times):
                prefill(model, cache, batch, context, chunk)
        row |= {"prefill s": statistics.median(times), "prefill peak GiB": peak_gib()}
    else:
        cache = new_cache(name, model, length, o["cache"])
        reset_peak()
        fill(cache, model, batch, context)
    with decoder(model, cache, batch, length, how_to(name, o), o["backend"]) as run:
        reset_peak()  # a replayed graph uses what its capture allocated, so that counts as well
        with timed(times):
            run(WARM_UP)
        row |= {"warm-up s": times[-1]}
        with timed(times):
            run(new)
    row |= {"tokens/s": batch * new / times[-1], "ms/step": times[-1] / new * 1e3}
    return row | {"peak GiB": peak_gib(), "cache GiB": cache_bytes(cache) / 2**30}


@torch.no_grad()
def converse(model: PreTrainedModel, name: str, batch: int, context: int, new: int, o: Row) -> Row:
    """One case of the paper's protocol: a prompt and `new` tokens, time of both."""
    length, times, how = context + new, list[float](), how_to(name, o)
    reset_peak()
    cache = new_cache(name, model, length, o["cache"])
    prefill(model, cache, batch, context, o["chunk"])
    with ExitStack() as stack:
        run = stack.enter_context(decoder(model, cache, batch, length, how, o["backend"]))
        run(WARM_UP)
        if how == "eager":
            del cache, run
            stack.close()
            gc.collect()
            cache = new_cache(name, model, length, o["cache"])
            run = stack.enter_context(decoder(model, cache, batch, length, how, o["backend"]))
        else:
            cache.reset()
        with timed(times):
            prefill(model, cache, batch, context, o["chunk"])
            run(new - 1)
    row = {"tokens/s": batch * new / times[-1], "seconds": times[-1], "peak GiB": peak_gib()}
    return row | {"cache GiB": cache_bytes(cache) / 2**30}


def attempt(one: Callable[[], Row], seconds: float) -> tuple[Row, bool] | None:
    """A case's results or why there are none, and whether smaller cases may do better.

    None if there was not enough time.
    """
    clean()
    begun, smaller = time.monotonic(), True
    try:
        with time_limit(seconds):
            row = one()
    except OutOfTime:
        return None
    except Exception as error:  # whatever it is, the next case shall run
        smaller = "out of memory" in str(error).lower()
        line = (str(error).strip() or repr(error)).splitlines()[0][:200]
        row = {"failed": "out of memory" if smaller else f"{type(error).__name__}: {line}"}
    return row | {"case s": time.monotonic() - begun}, smaller


def run_cases(
    one: Callable[..., Row], model_name: str, layers: int | None, names: list[str],
    cases: list[tuple[int, int, int]], cap_gb: float | None, options: Row, seconds: float,
    out: Path | None,
) -> None:  # fmt: skip
    """Measure each case `(batch, context, new)` with every cache, while there is time.

    After a case that does not fit, smaller ones only.
    """
    if model_name not in MODELS:
        raise typer.BadParameter(f"model {model_name!r}: choose from {', '.join(MODELS)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    cap(cap_gb)
    model, where = new_model(model_name, layers), environment()
    where["command"] += " " + " ".join(sys.argv[1:])
    sync()
    print(f"{where['device']}: model after {time.monotonic() - started:.0f} s", flush=True)
    said = {"compile": options["compile"], "prefill": options["prefill"], "chunk": options["chunk"]}
    said |= options["cache"]
    failed: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    rows, skipped = list[Row](), list[str]()
    for batch, context, new in cases:
        for name in names:
            if any(batch >= b and context >= c for b, c in failed[name]):
                continue
            left = seconds - (time.monotonic() - started)
            if left < LEAST:
                skipped.append(f"{batch}x{context} {name}")
                continue
            row = {"model": model_name, "layers": model.config.num_hidden_layers, "batch": batch}
            row |= {"context": context, "new": new, "cache": name, "cap GB": cap_gb}
            row["options"] = {key: value for key, value in said.items() if value}
            result = attempt(partial(one, model, name, batch, context, new, options), left)
            if result is None:
                skipped.append(f"{batch}x{context} {name} (cut off)")
                continue
            row |= result[0]
            if "failed" in row:
                failed[name].append((batch, context) if result[1] else (0, 0))
            print(f"[{time.monotonic() - started:.0f} s] {brief(row)}", flush=True)
            merge(out, row | {"environment": where})
            rows.append(row)
    print("\nAll:", *map(brief, rows), sep="\n")
    if skipped:
        print(f"No time in {seconds:.0f} s for: {', '.join(skipped)}")


def parse_cases(text: str, new: int) -> list[tuple[int, int, int]]:
    """`"1x131072,8x8192"`: batch and context of each case."""
    try:
        return [(int(b), int(c), new) for b, c in (part.split("x") for part in text.split(","))]
    except ValueError as error:
        raise typer.BadParameter(f"cases {text!r}: write 1x131072,8x8192") from error


def parse_caches(text: str) -> list[str]:
    try:
        return [check_cache(name) for name in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Caches = Annotated[str, typer.Option(help="static, dynamic, kivi-2, kivi-2-compiled, plumb-2, ...")]
Seconds = Annotated[float, typer.Option(help="After so many, say what there was no time for.")]
Compile = Annotated[
    Literal["layer", "whole"], typer.Option(help="layer: one layer for all, or whole: the step.")
]


@app.command()
def grid(
    model: str = "llama-3.1-8b",
    cases: Annotated[str, typer.Option(help="Batches and contexts, what matters first.")] = (
        "1x131072,32x32768,1x8192,8x8192,16x32768,1x32768,8x32768,32x8192,1x1024,8x1024,32x1024,"
        "64x1024,64x8192,64x32768,8x131072"
    ),
    caches: Caches = "dynamic,static,kivi-2,kivi-2-compiled,kivi-4-compiled",
    new: int = 48,
    layers: int | None = None,
    prefill: bool = False,
    chunk: int | None = None,
    cap_gb: float | None = None,
    group_size: int | None = None,
    residual_length: int | None = None,
    compile: Compile = "layer",
    backend: str = "inductor",
    seconds: Seconds = 3600,
    out: Path | None = None,
) -> None:
    """Decode speed and memory over batches and contexts."""
    options = {"prefill": prefill, "chunk": chunk, "backend": backend, "compile": compile}
    options["cache"] = {"group_size": group_size, "residual_length": residual_length}
    names, what = parse_caches(caches), parse_cases(cases, new)
    run_cases(measure, model, layers, names, what, cap_gb, options, seconds, out)


@app.command()
def paper(
    model: str = "llama-2-7b",
    batch: str = "32,64,128,192,256,320,384,448,512,640,768",
    caches: Caches = "dynamic,static,kivi-2,kivi-2-compiled",
    prompt: int = 161,
    new: int = 338,
    layers: int | None = None,
    cap_gb: float | None = None,
    group_size: int | None = None,
    residual_length: int | None = None,
    compile: Compile = "layer",
    backend: str = "inductor",
    seconds: Seconds = 3600,
    out: Path | None = None,
) -> None:
    """The paper's throughput experiment: batches up to what memory holds."""
    options = {"prefill": True, "chunk": None, "backend": backend, "compile": compile}
    options["cache"] = {"group_size": group_size, "residual_length": residual_length}
    names = parse_caches(caches)
    what = parse_cases(",".join(f"{b}x{prompt}" for b in batch.split(",")), new)
    run_cases(converse, model, layers, names, what, cap_gb, options, seconds, out)


@app.command()
def plot(
    record: Path,
    picture: Path,
    model: str = "llama-3.1-8b",
    caches: Caches = "dynamic,static,quanto-2,hqq-2,kivi-2,kivi-2-compiled,kivi-4-compiled",
    batch: Annotated[int, typer.Option(help="Of the panels along contexts.")] = 1,
    context: Annotated[int, typer.Option(help="Of the panels along batches.")] = 32768,
) -> None:
    """Tokens/s and peak memory along contexts, and along batches."""
    names = parse_caches(caches)
    try:
        generate_record.plot(record, picture, model, names, batch, context)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
