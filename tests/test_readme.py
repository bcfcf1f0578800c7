"""README.md and CONTRIBUTING.md keep what they promise: commands, snippets, links."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from kivi.__main__ import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
RUN = "<!-- run -->"
BLOCK = re.compile(r"(?P<mark><!-- run -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)


def blocks(language: str) -> Iterator[tuple[str, re.Match[str]]]:
    for page in PAGES:
        for block in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
            if block["language"] == language:
                yield page, block


COMMANDS = [
    (page, line) for page, block in blocks("sh") for line in block["body"].splitlines() if line
]
SNIPPETS = [
    pytest.param(block["body"], id=f"{page}-{index}")
    for index, (page, block) in enumerate(blocks("python"))
    if block["mark"]
]


def sessions_of_noxfile() -> set[str]:
    """Names of the sessions, read from the source: nox is not part of the tests' environment."""
    names = set()
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            keywords = [k for d in node.decorator_list for k in getattr(d, "keywords", [])]
            given = [ast.literal_eval(k.value) for k in keywords if k.arg == "name"]
            names.add(given[0] if given else node.name)
    return names


def sessions_named(line: str) -> list[str]:
    words = shlex.split(line)
    if "nox" not in words or "-s" not in words:
        return []
    after = words[words.index("-s") + 1 :]
    stop = next((i for i, word in enumerate(after) if word.startswith(("-", "&"))), len(after))
    return after[:stop]


def test_nox_sessions_exist() -> None:
    named = {session for _, line in COMMANDS for session in sessions_named(line)}
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {"demo", "tests"} <= named
    assert named <= sessions_of_noxfile()
    assert set(table) == sessions_of_noxfile()


def test_ci_runs_the_documented_command() -> None:
    documented = {line for _, line in COMMANDS if "install" in line and "tests" in line}
    documented = {line for line in documented if "tests" in sessions_named(line)}
    ran = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "nox -s" in line]
    assert len(documented) == 1
    assert ran == list(documented)


def parse(line: str) -> None:
    """Parse a `kivi ...` command as the command line would, without running it."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    assert name in group.commands, f"no command {name!r}"
    group.commands[name].make_context(name, list(arguments))


KIVI_COMMANDS = sorted({line for _, line in COMMANDS if line.startswith("kivi ")})


@pytest.mark.parametrize("line", KIVI_COMMANDS)
def test_kivi_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["kivi ablate --no-such-option", "kivi nothing"])
def test_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"no-such-option|nothing"):
        parse(line)


def test_commands_and_snippets_are_found() -> None:
    marks = sum((ROOT / page).read_text(encoding="utf-8").count(RUN) for page in PAGES)
    assert len(SNIPPETS) == marks >= 3
    assert len(KIVI_COMMANDS) >= 3


def test_python_is_run_or_at_least_valid() -> None:
    for _, block in blocks("python"):
        ast.parse(block["body"])


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_exist(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing
