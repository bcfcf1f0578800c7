"""The command line, run in this process on a tiny model saved to disk."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from one_thread import one_thread  # noqa: F401 - a fixture for this module
from rich.console import Console
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from kivi import KVQuantizer, cli_ablate, cli_schemes
from kivi.__main__ import Preset, app
from kivi.cli_ablate import make_candidate
from kivi.cli_generate import ConsoleStreamer
from kivi.cli_model import LoadedModel
from kivi.cli_schemes import PRESETS, choose_schemes, fitting, parse_scheme, parse_value
from kivi.evals.ablation import Candidate
from kivi.evals.feeding import Cache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def kivi(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "120"})


def refused(result: Result) -> str:
    """The one line of a refused command."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


# ---------------------------------------------------------------- schemes


def test_scheme_strings() -> None:
    assert parse_scheme("kivi") == KVQuantizer.get("kivi")
    assert parse_scheme(" kivi : bits = 4 , group_size=64,grid=least_squares") == KVQuantizer.get(
        "kivi", bits=4, group_size=64, grid="least_squares"
    )
    assert parse_scheme("kivi:group_size=none") == KVQuantizer.get("kivi", group_size=None)


def test_values_of_options() -> None:
    texts = ("2", "-1", "0.5", "1e-3", "true", "False", "none", "None", "symmetric")
    assert [parse_value(t) for t in texts] == [
        2, -1, 0.5, 1e-3, True, False, None, None, "symmetric"
    ]  # fmt: skip
    assert type(parse_value("2")) is int and type(parse_value("2.0")) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "scheme '' has no name"),
        (":bits=2", "scheme ':bits=2' has no name"),
        ("kivi:", "no options after the colon"),
        ("kivi:bits", "'bits' is not option=value"),
        ("kivi:bits=", "'bits=' is not option=value"),
        ("kivi:=2", "'=2' is not option=value"),
        ("kivi:bits=2,", "'' is not option=value"),
        ("kivi:bits=2,bits=4", "the option 'bits' twice"),
        ("kiwi", "did you mean 'kivi'"),
        ("kivi:bit=2", "did you mean 'bits'"),
        ("kivi:bits=5", "bits=5 is not allowed"),
        ("kivi:bits=true", "bits=True is not allowed"),
    ],
)
def test_scheme_strings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scheme(text)


def test_presets_are_those_of_the_command_and_all_parse() -> None:
    assert [p.value for p in Preset] == list(PRESETS)
    for name, labels in PRESETS.items():
        schemes = {parse_scheme(label) for label in labels}
        assert 4 <= len(schemes) == len(labels)
        assert name in ("zoo", "bits") or len(labels) <= 25
    widths = {
        name: set() for name in KVQuantizer.available() if "bits" in KVQuantizer.options(name)
    }
    for scheme in map(parse_scheme, PRESETS["bits"]):
        widths[scheme.name].add(scheme.bits)
    assert widths.pop("turboquant") == {1, 2, 3, 4}  # Lloyd-Max codebooks end there
    assert all(found == {1, 2, 3, 4, 8} for found in widths.values())
    zoo = {parse_scheme(label).name for label in PRESETS["zoo"]}
    axes = {"per_token", "per_channel", "crossed", "kivi_symmetric"}  # KIVI's own ablations
    assert zoo == set(KVQuantizer.available()) - axes


def test_a_scheme_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's, which the command line finds as it starts."""

    class Broken:
        def get(name: str, **options: object) -> KVQuantizer:
            if name == "kivi":
                raise KeyError(options["bits"])
            return KVQuantizer.get(name, **options)

        get, available = staticmethod(get), KVQuantizer.available

    monkeypatch.setattr(cli_schemes, "KVQuantizer", Broken)
    assert cli_schemes.every_width() == tuple(
        label for label in PRESETS["bits"] if not label.startswith("kivi:")
    )


def test_choice_of_schemes() -> None:
    assert list(choose_schemes(None, ())) == list(PRESETS["default"])
    assert list(choose_schemes(None, ("int8", "kivi", "int8"))) == ["int8", "kivi"]
    assert list(choose_schemes("bits", ("int8",))) == [*PRESETS["bits"], "int8"]
    with pytest.raises(ValueError, match=r"preset='x' .* paper-axes"):
        choose_schemes("x", ())


def test_a_preset_leaves_out_what_does_not_fit() -> None:
    out = Console(file=StringIO(), width=200)
    schemes = choose_schemes("zoo", ())
    kept = fitting(schemes, (), 80, out)
    said = out.file.getvalue().splitlines()
    assert len(kept) + len(said) == len(schemes) and "plumb" in kept
    assert "kivi is left out: group_size=32 does not divide head_dim=80" in "\n".join(said)
    assert fitting(schemes, tuple(schemes), 64, out) == schemes
    with pytest.raises(ValueError, match=r"scheme='kivi' does not fit this model: group_size=32"):
        fitting(schemes, ("kivi",), 80, out)
    with pytest.raises(ValueError, match="no scheme of the preset fits"):
        fitting(choose_schemes(None, ("kivi",)), (), 80, out)


def test_schemes_command_where_not_all_fit() -> None:
    lines = kivi("schemes", "--head-dim", 80).stdout.splitlines()
    line = next(x for x in lines if x.startswith("│ kivi "))
    assert line.split("│")[3].strip() == "-"
    assert "head_dim=0 is not allowed" in refused(kivi("schemes", "--head-dim", 0))


def test_schemes_command_lists_every_scheme() -> None:
    result = kivi("schemes", "--head-dim", 64)
    assert result.exit_code == 0
    for name in KVQuantizer.available():
        assert re.search(rf"^\W*{name}\W", result.stdout, re.MULTILINE), name
    assert "arXiv:2402.02750" in result.stdout and "residual_length=128" in result.stdout
    assert "head dimension 64" in result.stdout and "3.00" in result.stdout


# ---------------------------------------------------------------- help


def test_help() -> None:
    result = kivi("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("ablate", "schemes", "generate"))
    options = kivi("ablate", "--help").stdout
    for name in ("model", "scheme", "preset", "text", "out", "device", "impl", "chunk", "seed"):
        assert f"--{name}" in options
    assert "paper-axes" in options


def test_command_line_loads_nothing_heavy_of_its_own() -> None:
    code = (
        "import sys, kivi; before = set(sys.modules); import kivi.__main__; "
        "new = set(sys.modules) - before; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'kivi.hf') if m in new])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- ablate

SMALL = ("--context", 256, "--prefill", 192, "--tokens", 128, "--chunk", 16, "--device", "cpu")


def test_ablate_writes_its_report(tiny: Path, tmp_path: Path) -> None:
    given = ("ablate", "--model", tiny, "--text", tiny / "text.txt", *SMALL)
    schemes = ("full_precision", "kivi:bits=2,residual_length=32", "kivi:bits=8,residual_length=32")
    given += tuple(x for label in schemes for x in ("--scheme", label))
    given += ("--passkey-length", 300, "--passkey-depth", 0.5, "--passkey-samples", 2)
    result = kivi(*given, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "Full precision: perplexity" in result.stdout and "kivi:bits=2" in result.stdout
    assert "quality_vs_bits.png, pareto.png, passkey.png" in result.stdout
    assert "Traceback" not in result.stderr

    with (tmp_path / "a" / "ablation.csv").open(newline="") as file:
        full, two, eight = csv.DictReader(file)
    assert [row["scheme"] for row in (full, two, eight)] == list(schemes)
    assert float(full["kl_mean"]) < 1e-6 < float(eight["kl_mean"]) < float(two["kl_mean"]) / 10
    assert float(full["top1"]) == 1.0 and float(full["attention_error"]) < 1e-5
    assert float(eight["attention_error"]) < float(two["attention_error"]) / 10
    assert int(two["cache_bytes_used"]) < int(eight["cache_bytes_used"])
    assert (two["key_bits"], two["group_size"], two["bits_per_element"]) == ("2", "32", "3.0")

    document = json.loads((tmp_path / "a" / "ablation.json").read_text())
    settings = document["settings"]
    assert (settings["sequences"], settings["evaluated_tokens"], settings["chunk"]) == (2, 128, 16)
    assert settings["text"] == "text.txt" and settings["dtype"] == "float32"
    assert [cell["total"] for cell in document["schemes"][0]["passkey_cells"]] == [2]
    assert document["full_precision_ppl"]["estimate"] == pytest.approx(float(full["ppl"]), rel=1e-5)
    assert settings["command"].startswith(f"kivi ablate --model {tiny} --scheme full_precision")

    again = kivi(*settings["command"].split()[1:], "--out", tmp_path / "b")
    assert again.exit_code == 0, again.output
    read = [(tmp_path / name / "ablation.csv").read_text() for name in ("a", "b")]
    assert read[0] == read[1]


def test_ablate_without_passkeys_or_recordable_attention(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    eager = save_tiny(tmp_path / "eager")
    (eager / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    result = kivi(
        *("ablate", "--model", eager, "--text", tiny / "text.txt", *SMALL, "--no-passkey"),
        *("--scheme", "int8", "--out", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "ablation.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["passkey"] == "" and not (tmp_path / "out" / "passkey.png").exists()
    assert row["attention_error"] == "" and "No attention error" in result.stderr


def ablate_with(
    errors: dict[str, BaseException], tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Result, list[list[str]]]:
    """An ablation whose schemes may raise, and what was on disk when each did."""
    on_disk: list[list[str]] = []

    def make(loaded: LoadedModel, label: str, scheme: KVQuantizer, impl: str) -> Candidate:
        candidate = make_candidate(loaded, label, scheme, impl)
        if label not in errors:
            return candidate

        def make_cache() -> Cache:
            written = out / "ablation.json"
            document = json.loads(written.read_text()) if written.exists() else {"schemes": []}
            on_disk.append([row["scheme"] for row in document["schemes"]])
            raise errors[label]

        return replace(candidate, make_cache=make_cache)

    monkeypatch.setattr(cli_ablate, "make_candidate", make)
    given = [x for label in ("int8", "kivi", "flexgen") for x in ("--scheme", label)]
    given += ["--text", tiny / "text.txt", *SMALL, "--no-passkey", "--out", out]
    return kivi("ablate", "--model", tiny, *given), on_disk


def test_ablate_goes_on_without_a_scheme_that_fails(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("out of [red]\nmemory")
    result, on_disk = ablate_with({"kivi": error}, tiny, tmp_path, monkeypatch)
    assert result.exit_code == 1 and on_disk == [["int8"]]
    said = "kivi failed and is left out: OutOfMemoryError: out of [red] memory"
    assert said in result.stderr.splitlines()
    assert "error: 1 of 3 failed: kivi" in result.stderr and "Traceback" not in result.output
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["scheme"] for row in document["schemes"]] == ["int8", "flexgen"]
    assert document["failed"] == [{"label": "kivi", "error": f"OutOfMemoryError: {error}"}]
    assert document["complete"] and document["settings"]["evaluated_tokens"] == 128
    text = (tmp_path / "ablation.md").read_text()
    assert "- `kivi`: OutOfMemoryError: out of [red] memory" in text and "Incomplete" not in text
    assert "| flexgen |" in text and "| kivi |" not in text and "pareto.png" in text


def test_ablate_interrupted_keeps_what_was_finished(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = ablate_with({"kivi": KeyboardInterrupt()}, tiny, tmp_path, monkeypatch)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["scheme"] for row in document["schemes"]] == ["int8"]
    assert not document["complete"] and document["failed"] == []
    text = (tmp_path / "ablation.md").read_text()
    assert "**Incomplete**" in text and "pareto.png" in text and (tmp_path / "pareto.png").exists()
    first = ablate_with({"int8": KeyboardInterrupt()}, tiny, tmp_path / "none", monkeypatch)[0]
    assert first.exit_code == 130 and not (tmp_path / "none").exists()


def test_ablate_in_which_all_fail_writes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = dict.fromkeys(("int8", "kivi", "flexgen"), ValueError("no"))
    result, _ = ablate_with(errors, tiny, tmp_path / "out", monkeypatch)
    assert result.exit_code == 1 and result.stdout == "" and not (tmp_path / "out").exists()
    assert "error: no scheme was evaluated" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "kiwi"], "did you mean 'kivi'"),
        (["--chunk", "0"], "chunk=0"),
        (["--out", __file__], "test_cli.py' is a file"),
        (["--tokens", "0"], "tokens=0"),
        (["--context", "9", "--prefill", "9"], "prefill=9 is not allowed; it must be 1 to 8"),
        (["--context", "2000"], "context=2000 is not allowed; this model has 1024 positions"),
        (["--tokens", "30000"], "the text has 12000 tokens"),
        (["--passkey-length", "5000"], "passkey length=5000"),
        (["--passkey-length", "20"], "length must be at least"),
        (["--passkey-depth", "2"], r"depth must lie in [0, 1]"),
        (["--text", "nowhere.txt"], "text='nowhere.txt' can't be read"),
        (["--model", "./nowhere"], "model='./nowhere' can't be loaded"),
        (["--device", "tpu9"], "device='tpu9' can't be used"),
        (["--dtype", "int4"], "dtype='int4' is not allowed; choose from auto, float32"),
        (["--impl", "magic"], "impl='magic' is not allowed"),
    ],
)
def test_ablate_refuses(options: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    given = ["--model", tiny, "--text", tiny / "text.txt", "--scheme", "kivi", "--out", tmp_path]
    given += ["--context", 256, "--tokens", 128, "--passkey-length", 300, "--passkey-samples", 1]
    names = options[::2]
    for name in names:  # the last of a repeated option would add to it
        if name in given and name not in ("--scheme",):
            at = given.index(name)
            del given[at : at + 2]
    assert message in refused(kivi("ablate", *given, *options))
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_can_not_do_passkeys_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["x1"] = tokenizer["model"]["vocab"].pop("1")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = ("--context", 128, "--tokens", 64, "--text", tiny / "text.txt", "--scheme", "kivi")
    line = refused(kivi("ablate", "--model", folder, *given, "--out", tmp_path / "out"))
    assert "digit" in line and "use --no-passkey" in line


def test_passkeys_need_a_first_token(tiny: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    given = ("--context", 128, "--tokens", 64, "--text", tiny / "text.txt", "--scheme", "kivi")
    line = refused(kivi("ablate", "--model", folder, *given, "--out", tmp_path / "out"))
    assert "bos token; use --no-passkey" in line


# ---------------------------------------------------------------- generate


def test_generate_streams_what_the_model_says(tiny: Path) -> None:
    given = ("generate", "--model", tiny, "--prompt", "hello world", "--max-new-tokens", 40)
    exact = kivi(*given, "--scheme", "full_precision")
    assert exact.exit_code == 0, exact.output
    *text, summary = exact.stdout.rstrip("\n").split("\n")
    assert "\n".join(text).startswith("hello world")
    assert re.match(
        r"40 tokens, [\d.]+ tokens/s decoding, cache [\d.]+ MiB allocated, [\d.]+ MiB used "
        r"\(full_precision, 16.00 bits per element\)",
        summary,
    )

    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    inputs = tokenizer("hello world", return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert "\n".join(text).rstrip("\n") == expected.rstrip("\n")

    quantized = kivi(*given, "--scheme", "int8")
    assert quantized.exit_code == 0 and "(int8, 8.50 bits per element)" in quantized.stdout


def test_streamed_characters_are_whole() -> None:
    out = StringIO()
    tokenizer = tiny_tokenizer()
    streamer = ConsoleStreamer(tokenizer, Console(file=out))
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt is not printed
    ids = tokenizer("aé[red]", add_special_tokens=False)["input_ids"]
    seen = []
    for token in ids:
        streamer.put(torch.tensor([token]))
        seen.append(out.getvalue())
    streamer.end()
    assert seen[:3] == ["a", "a", "aé"] and out.getvalue() == "aé[red]\n"
    assert len(streamer.times) == len(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--max-new-tokens", "2000"], "prompt + max_new_tokens=2005"),
        (["--scheme", "kivi:bits=7"], "bits=7 is not allowed"),
        (["--impl", "cuda"], "impl='cuda'"),
    ],
)
def test_generate_refuses(options: list[str], message: str, tiny: Path) -> None:
    assert message in refused(kivi("generate", "--model", tiny, "--prompt", "hello", *options))


def test_generate_needs_a_token(tiny: Path) -> None:
    assert "prompt is empty" in refused(kivi("generate", "--model", tiny, "--prompt", ""))


def test_one_token_has_no_speed(tiny: Path) -> None:
    result = kivi("generate", "--model", tiny, "--prompt", "hello", "--max-new-tokens", 1)
    assert result.exit_code == 0 and "1 tokens, no token decoded" in result.stdout
