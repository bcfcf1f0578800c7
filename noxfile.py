"""What a developer runs: `nox -s demo`, `nox -s tests`, ...; `nox -l` lists the sessions."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
# Packages are checked again at every run; only making the environment anew is saved.
nox.options.reuse_venv = "yes"

# An exact torch, because on a machine that has none a bare `torch` takes the newest release, which
# on Linux brings gigabytes of CUDA packages; the exact one takes a CPU build wherever pip's
# configuration offers it. Someone who wants CUDA has a torch already: add `--no-venv --no-install`
# to run a session in the environment that nox itself runs in.
TORCH = "torch==2.13.0"
OLDEST_TRANSFORMERS = "transformers==5.17.0"
# A new release must not turn a check red by itself: these move by hand.
RUFF, MYPY, TYPED_TRANSFORMERS = "ruff==0.17.6", "mypy==2.4.1", "transformers==5.23.0"


@nox.session
def demo(session: nox.Session) -> None:
    """The ablation on the embedded model; arguments after -- go to `kivi ablate`."""
    session.install(TORCH, ".")
    session.run("kivi", "ablate", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(RUFF)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Strict type checking of the package."""
    session.install(TORCH, TYPED_TRANSFORMERS, "-e", ".", MYPY)
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Every test that needs no GPU, the compiled ones included, with coverage.

    What touches transformers runs with the oldest release supported as well. Arguments after --
    choose tests; a part of them is not held to the bound on coverage.
    """
    pytest = ["pytest", "-m", "not gpu", "--hypothesis-profile=ci"]
    session.install("--upgrade", TORCH, "transformers", "-e", ".[test]")
    if session.posargs:
        session.run(*pytest, *session.posargs)
        return
    session.run(*pytest, "--cov", "--cov-report=term", "--durations=15")
    session.install(OLDEST_TRANSFORMERS)
    session.run(*pytest, *map(str, sorted(Path("tests").glob("test_hf*.py"))))


@nox.session(name="compile")
def compile_(session: nox.Session) -> None:
    """Only the tests that compile: what `tests` runs as well, for working on one of them."""
    session.install(TORCH, "-e", ".[test]")
    session.run("pytest", "-m", "compile and not gpu", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests on a GPU, in this environment: its torch is the one that fits the driver."""
    probe = "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA device')"
    session.run("python", "-c", probe)
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks; on a GPU machine add `--no-venv --no-install`."""
    session.install(TORCH, "-e", ".[test]")
    session.run(
        "pytest", "bench", "-o", "python_files=bench_*.py", "--benchmark-only", *session.posargs
    )
