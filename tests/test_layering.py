"""The shape of the package: who may import whom, and what may stand where.

Each check is a function from a tree of sources to a list of problems, so that it can be run on the
package and on small trees that break it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kivi"

# Bottom up. A module imports only from lower layers, or from its own as long as there is no cycle.
LAYERS = (
    ("kivi.spec",),
    ("kivi.checks",),
    ("kivi.packing",),
    ("kivi.grids", "kivi.transforms", "kivi.codebooks"),
    ("kivi.opaque",),
    ("kivi.quantize",),
    ("kivi.room",),
    ("kivi.view",),
    ("kivi.kernels.reference", "kivi.kernels.sparse", "kivi.kernels.triton_*"),
    ("kivi.kernels",),
    ("kivi.pages",),
    ("kivi.smoothing",),
    ("kivi.steps",),
    ("kivi.store",),
    ("kivi.saliency",),
    ("kivi.sinks",),
    ("kivi.attention",),
    ("kivi.cache", "kivi.cache_*"),
    ("kivi.quantizer",),
    ("kivi.schemes", "kivi.schemes.*"),
    ("kivi.testing",),
    ("kivi",),
    ("kivi.hf", "kivi.hf_*"),
    ("kivi.evals", "kivi.evals.*"),
    ("kivi.__main__", "kivi.cli", "kivi.cli_*"),
)
# Two implementations of one op are compared with each other; neither may lean on the other.
IMPLEMENTATIONS = (("kivi.kernels.reference",), ("kivi.kernels.triton_*",))
MAY_IMPORT_TRANSFORMERS = ("kivi.hf", "kivi.hf_attention", "kivi.hf_layer", "kivi.hf_models")
MAY_SHIFT = ("kivi.packing", "kivi.kernels.triton_tile*")
# The command line offers presets, lists of schemes to compare: naming them is what it is for.
MAY_NAME_SCHEMES = ("kivi.schemes", "kivi.schemes.*", "kivi.__main__", "kivi.cli", "kivi.cli_*")
MAX_LINES = 350


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of all modules of the package at `root`."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for name, path in modules(root).items():
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def imported(name: str, tree: ast.Module, path: Path) -> set[str]:
    """Everything a module imports, inside functions as well, as absolute dotted names."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, tree in trees(root):
        targets = set()
        for target in imported(name, tree, known[name]):
            # `from kivi.spec import KVSpec` names an attribute of the module kivi.spec.
            while target and target not in known:
                target = target.rpartition(".")[0]
            targets.add(target)
        graph[name] = targets - {"", name}
    return graph


def layer_of(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if matches(name, layer)), None)


def upward_imports(root: Path) -> list[str]:
    problems = []
    for name, targets in import_graph(root).items():
        own = layer_of(name)
        if own is None:
            problems.append(f"{name} stands in no layer: add it to LAYERS")
            continue
        for target in sorted(targets):
            other = layer_of(target)
            if other is not None and other > own:
                problems.append(f"{name} imports {target}, which is above it")
            kinds = [[matches(n, kind) for kind in IMPLEMENTATIONS] for n in (name, target)]
            if all(map(any, kinds)) and kinds[0] != kinds[1]:
                problems.append(f"{name} imports {target}: implementations are independent")
    return problems


def cycles(root: Path) -> list[str]:
    graph = import_graph(root)
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [" -> ".join([*trail[trail.index(name) :], name])]
        if name in done:
            return []
        found = [p for target in sorted(graph[name]) for p in walk(target, [*trail, name])]
        done.add(name)
        return found

    return [problem for name in graph for problem in walk(name, [])]


def foreign_imports(root: Path) -> list[str]:
    """Only kivi.hf knows transformers; triton stays in its kernels."""
    problems = []
    allowed = {"transformers": MAY_IMPORT_TRANSFORMERS, "triton": ("kivi.kernels.triton_*",)}
    for name, tree in trees(root):
        top_level = {i.split(".")[0] for i in imported(name, tree, modules(root)[name])}
        problems += [
            f"{name} imports {library}"
            for library, where in allowed.items()
            if library in top_level and not matches(name, where)
        ]
    return problems


def scheme_names(root: Path) -> set[str]:
    """The names that the classes in kivi/schemes register: `class C(KVQuantizer, name="c")`."""
    return {
        keyword.value.value
        for module, tree in trees(root)
        if matches(module, ("kivi.schemes", "kivi.schemes.*"))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for keyword in node.keywords
        if keyword.arg == "name"
        and isinstance(keyword.value, ast.Constant)
        and isinstance(keyword.value.value, str)
    }


def named_schemes(root: Path) -> list[str]:
    """String literals that are a scheme's name, or a name with options (`"kivi:bits=2"`)."""
    names = scheme_names(root)
    return [
        f"{module}:{node.lineno} names the scheme {node.value!r}"
        for module, tree in trees(root)
        if not matches(module, MAY_NAME_SCHEMES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.sub(r":\w+=.*", "", node.value) in names
    ]


def shifts(root: Path) -> list[str]:
    calls = {f"{prefix}{way}shift" for prefix in ("", "__", "bitwise_") for way in ("l", "r")}
    calls |= {"__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift"}
    return [
        f"{name}:{node.lineno} shifts bits"
        for name, tree in trees(root)
        if not matches(name, MAY_SHIFT)
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.BinOp | ast.AugAssign)
            and isinstance(node.op, ast.LShift | ast.RShift)
        )
        or (isinstance(node, ast.Attribute) and node.attr in calls)
    ]


def passed_through(root: Path) -> list[str]:
    """Functions that hand their own `**kwargs` on.

    `**options` may be handed on: so are called the options of a scheme, which end in the
    constructor of its dataclass, where an unknown one is an error that names what is allowed.
    """
    problems = []
    for name, tree in trees(root):
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            own = function.args.kwarg.arg if function.args.kwarg else None
            problems += [
                f"{name}:{call.lineno} passes **{own} through"
                for call in ast.walk(function)
                if isinstance(call, ast.Call) and own not in (None, "options")
                for keyword in call.keywords
                if keyword.arg is None
                and isinstance(keyword.value, ast.Name)
                and keyword.value.id == own
            ]
    return problems


def environment(root: Path) -> list[str]:
    return [
        f"{name}:{node.lineno} reads the environment"
        for name, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]


def long_files(root: Path) -> list[str]:
    lengths = {n: len(p.read_text(encoding="utf-8").splitlines()) for n, p in modules(root).items()}
    return [f"{n} has {lines} lines" for n, lines in lengths.items() if lines > MAX_LINES]


CHECKS = (
    upward_imports,
    cycles,
    foreign_imports,
    named_schemes,
    shifts,
    passed_through,
    environment,
    long_files,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package(check: Callable[[Path], list[str]]) -> None:
    assert check(PACKAGE) == []


def test_package_is_read() -> None:
    graph = import_graph(PACKAGE)
    assert "kivi.spec" in graph["kivi.quantize"]
    assert "kivi" in scheme_names(PACKAGE)


BROKEN = [
    (upward_imports, {"spec.py": "def f():\n    from kivi.cache import LayerCache"}, "kivi.cache"),
    (upward_imports, {"spec.py": "from .cache import LayerCache"}, "kivi.cache"),
    (upward_imports, {"schemes/new.py": "import kivi.hf"}, "kivi.hf"),
    (upward_imports, {"attention.py": "from kivi import KVQuantizer"}, "imports kivi, "),
    (upward_imports, {"utils.py": ""}, "kivi.utils stands in no layer"),
    (
        upward_imports,
        {"kernels/triton_decode.py": "from kivi.kernels.reference import attend"},
        "independent",
    ),
    (
        upward_imports,
        {"kernels/reference.py": "from . import triton_tiles", "kernels/triton_tiles.py": ""},
        "independent",
    ),
    (
        cycles,
        {"evals/a.py": "from . import b", "evals/b.py": "def f():\n    import kivi.evals.a"},
        "kivi.evals.a -> kivi.evals.b -> kivi.evals.a",
    ),
    (foreign_imports, {"evals/a.py": "def f():\n    import transformers.cache_utils"}, "transform"),
    (foreign_imports, {"__main__.py": "from transformers import Cache"}, "kivi.__main__"),
    (foreign_imports, {"quantize.py": "import triton.language as tl"}, "triton"),
    (named_schemes, {"hf.py": 'def f(scheme="kivi"): ...'}, "kivi.hf:1"),
    (named_schemes, {"evals/a.py": 'SCHEMES = ["kivi:bits=2"]'}, "kivi:bits=2"),
    (shifts, {"grids.py": "levels = (1 << 2) - 1"}, "kivi.grids:1"),
    (shifts, {"cache.py": "x = 8\nx >>= 1"}, "kivi.cache:2"),
    (shifts, {"cache.py": "y = torch.bitwise_left_shift(x, 2)"}, "kivi.cache:1"),
    (passed_through, {"hf.py": "def f(**kwargs):\n    return g(1, **kwargs)"}, "**kwargs"),
    (passed_through, {"hf.py": "f = lambda **rest: g(**rest)"}, "**rest"),
    (environment, {"cache.py": "import os\nfast = os.environ.get('FAST')"}, "kivi.cache:2"),
    (long_files, {"cache.py": "x = 1\n" * (MAX_LINES + 1)}, "kivi.cache has 351 lines"),
]

# What must pass, so that a check which calls everything a problem is found as well.
SOUND = {
    "__init__.py": "from kivi.quantizer import KVQuantizer",
    "spec.py": '"""kivi: words."""',
    "packing.py": "from kivi.spec import WORD_BITS\nmask = (1 << 2) - 1",
    "quantize.py": "",
    "grids.py": "",
    "cache.py": "from kivi.kernels import reference\nop = 'kivi::flush'\nd = f(**g())",
    "attention.py": "",
    "hf.py": "import transformers\nfrom kivi import KVQuantizer\ndef f(**options): g(**options)",
    "quantizer.py": "from .cache import LayerCache",
    "kernels/__init__.py": "def impl():\n    from kivi.kernels import reference, triton_decode",
    "kernels/reference.py": "from kivi.packing import mask",
    "kernels/triton_decode.py": "import triton\nfrom kivi.kernels.triton_tiles import load",
    "kernels/triton_tiles.py": "load = 4 >> 1",
    "schemes/__init__.py": "",
    "schemes/kivi.py": (
        'from kivi.quantizer import KVQuantizer\nclass KIVI(KVQuantizer, name="kivi"): ...'
    ),
    "evals/__init__.py": "",
    "__main__.py": 'def main():\n    from kivi.hf import KVCache\n    preset = ["kivi:bits=2"]',
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "kivi" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "kivi"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound_tree_passes(check: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert check(write(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("check", "files", "expected"), BROKEN)
def test_broken_tree_is_found(
    check: Callable[[Path], list[str]], files: dict[str, str], expected: str, tmp_path: Path
) -> None:
    problems = check(write(tmp_path, SOUND | files))
    assert any(expected in problem for problem in problems), problems


def test_every_check_can_fail() -> None:
    assert {check for check, _, _ in BROKEN} == set(CHECKS)
