"""Report files, read again."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Annotation

from kivi import KVQuantizer
from kivi.evals import plots, report, rows
from kivi.evals.ablation import Ablation, Failure, SchemeScores
from kivi.evals.decoding import DecodeScores
from kivi.evals.environment import environment
from kivi.evals.feeding import CacheSize
from kivi.evals.intervals import Interval, wilson
from kivi.evals.retrieval import RecallCell, RecallScores

SCHEMES = (
    KVQuantizer.get("full_precision"),
    KVQuantizer.get("kivi", key_bits=4, group_size=64, grid="least_squares"),
    KVQuantizer.get("int8"),
)
LABELS = ("full_precision", "kivi:key_bits=4,group_size=64,grid=least_squares", "int8")
CELLS = tuple(RecallCell(n, d, k, 4) for n, d, k in ((512, 0.0, 4), (512, 0.5, 1), (2048, 0.5, 0)))
SETTINGS = report.Settings(
    command="kivi ablate --seed 3",
    model="embedded",
    text="book.txt",
    device="cpu",
    dtype="float32",
    impl="auto",
    context=64,
    prefill=32,
    chunk=8,
    sequences=2,
    batch_size=8,
    evaluated_tokens=64,
    seed=3,
    passkey_lengths=(512, 2048),
    passkey_depths=(0.0, 0.5),
    passkey_samples=4,
)


def scores(label: str, kl: float, *, full: bool) -> SchemeScores:
    decode = DecodeScores(
        perplexity=Interval(6.5, 6.25, 6.75),
        kl_mean=Interval(kl, kl * 0.5, kl * 2),
        kl_p999=Interval(kl * 10, kl * 9, kl * 11),
        top1=Interval(0.875, 0.75, 1.0),
        tokens=64,
        size=CacheSize(3 * 2**20, 2**20),
    )
    return SchemeScores(
        label, decode, RecallScores(CELLS) if full else None, (0.125, 0.25) if full else None
    )


def ablation(*, full: bool) -> Ablation:
    losses = (0.0, 0.03125, 0.000244140625)
    return Ablation(
        Interval(6.25, 6.0, 6.5),
        tuple(scores(n, kl, full=full) for n, kl in zip(LABELS, losses, strict=True)),
    )


def write(out: Path, *, full: bool = True) -> list[str]:
    files = report.write_report(
        out,
        ablation(full=full),
        SCHEMES,
        settings=SETTINGS,
        environment=environment(),
        head_dim=128,
    )
    assert all(file.stat().st_size > 0 for file in files)
    return [file.name for file in files]


def test_csv_says_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "ablation.csv").open(newline="") as file:
        full, kivi, int8 = csv.DictReader(file)
    assert [row["scheme"] for row in (full, kivi, int8)] == list(LABELS)
    recall = wilson(5, 12)
    expected = {
        "key_bits": 4,
        "value_bits": 2,
        "bits_per_element": 3.5,  # (4 + 2) / 2 + 32 / 64
        "ppl": 6.5,
        "ppl_low": 6.25,
        "ppl_high": 6.75,
        "kl_mean": 0.03125,
        "kl_mean_low": 0.015625,
        "kl_mean_high": 0.0625,
        "kl_p999": 0.3125,
        "top1": 0.875,
        "passkey": recall.estimate,
        "passkey_low": recall.low,
        "passkey_high": recall.high,
        "attention_error": 0.1875,
        "cache_bytes": 3 * 2**20,
        "cache_bytes_used": 2**20,
    }
    assert {name: float(kivi[name]) for name in expected} == pytest.approx(expected)
    assert [row["group_size"] for row in (full, kivi, int8)] == ["-", "64", "128"]
    assert (full["key_bits"], full["bits_per_element"]) == ("16", "16.0")


def test_csv_leaves_what_was_not_measured_empty(tmp_path: Path) -> None:
    names = write(tmp_path / "new" / "folder", full=False)
    plots = ["quality_vs_bits.png", "pareto.png"]
    assert names == ["ablation.csv", "ablation.json", "ablation.md", *plots]
    with (tmp_path / "new" / "folder" / "ablation.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert row["passkey"] == row["passkey_low"] == row["attention_error"] == ""


def test_json_says_how_it_was_measured(tmp_path: Path) -> None:
    write(tmp_path)
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["settings"] == json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["accelerator"] == "none"
    assert document["full_precision_ppl"] == {"estimate": 6.25, "low": 6.0, "high": 6.5}
    _, kivi, _ = document["schemes"]
    assert kivi["attention_error_by_layer"] == [0.125, 0.25]
    assert kivi["passkey_cells"][1] == {"length": 512, "depth": 0.5, "correct": 1, "total": 4}
    assert kivi["kl_mean"] == 0.03125


def test_markdown_shows_table_and_plots(tmp_path: Path) -> None:
    names = write(tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| scheme"))
    columns = [cell.strip() for cell in lines[head].strip("|").split("|")]
    row = [cell.strip() for cell in lines[head + 3].strip("|").split("|")]
    assert len(columns) == len(row) == lines[head + 1].count("---")
    shown = dict(zip(columns, row, strict=True))
    assert shown["scheme"] == LABELS[1]
    assert (shown["ppl"], shown["KL mean"], shown["cache MiB"]) == ("6.500", "0.031", "3.00")
    assert (shown["top-1"], shown["passkey"], shown["attn error"]) == ("87.5%", "42%", "18.75%")
    for name in names:
        assert (f"![{name}]({name})" in text) == name.endswith(".png")
    assert "`kivi ablate --seed 3`" in text and "perplexity 6.250 (6.000 to 6.500)" in text
    assert "chunks of 8" in text and "Passkeys: lengths 512, 2048 at depths 0, 0.5" in text


def test_plots_are_pictures_of_readable_size(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("quality_vs_bits.png", "passkey.png"):
        height, width, _ = imread(tmp_path / name).shape
        assert 700 <= width <= 2000 and 300 <= height <= 1500


def test_small_numbers_for_people() -> None:
    assert [rows.small(x) for x in (0.0, -1e-9, 2.34e-5, 0.0123, 1.26)] == [
        "0",
        "0",
        "2.3e-05",
        "0.012",
        "1.3",
    ]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("kivi", {}, ("kivi", "kivi 2 bit")),
        ("kivi", {"bits": 4}, ("kivi", "kivi 4 bit")),
        ("kivi", {"key_bits": 4}, ("kivi", "kivi K4 V2")),
        ("kivi", {"group_size": 64}, ("kivi", "kivi 2 bit G=64")),
        (
            "kivi",
            {"grid": "least_squares", "sink_length": 4},
            ("kivi sink_length=4 least_squares", "kivi sink_length=4 least_squares 2 bit"),
        ),
        ("full_precision", {}, ("full_precision", "full_precision")),
    ],
)
def test_short_names(name: str, options: dict[str, object], expected: tuple[str, str]) -> None:
    assert rows.short_names(KVQuantizer.get(name, **options)) == expected


def test_group_sizes_that_differ() -> None:
    kivi = KVQuantizer.get("kivi", group_size=None)
    (_, middle, _) = ablation(full=True).schemes
    assert rows.make_row(middle, kivi, 64).group_size == "512/64"


# ---------------------------------------------------------------- plots

CROWD = [
    plots.Point(name, f"{name} 2 bit", bits, (kl, kl * 0.9, kl * 1.1))
    for name, bits, kl in (
        ("kivi", 3.0, 0.058),
        ("kivi least_squares", 3.0, 0.057),
        ("per_token", 3.0, 0.096),
        ("per_channel", 3.0, 0.079),
        ("crossed", 3.0, 0.116),
        ("kivi_symmetric", 2.75, 0.09),
        ("flexgen", 4.5, 0.003),
        ("int8", 8.25, 1e-5),
    )
]


def test_labels_of_a_crowd_do_not_overlap() -> None:
    figure = plots.quality_figure([*CROWD, plots.Point("exact", "exact", 16.0, (0.0, 0.0, 0.0))])
    assert figure is not None
    (axes,) = figure.axes
    figure.draw_without_rendering()
    texts = [t for t in axes.texts if isinstance(t, Annotation)]
    note = [t for t in texts if t.get_text().startswith("lower left")]
    assert len(note) == 1 and note[0].get_text().endswith("without loss: exact")
    boxes = [t.get_window_extent() for t in texts]
    assert len(boxes) == len(CROWD) + 1
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, texts[i].get_text()
        for other in boxes[:i]:
            assert not box.overlaps(other), texts[i].get_text()


def test_a_label_stands_left_where_the_right_is_taken() -> None:
    points = [
        plots.Point("a", "a rather long label", 3.0, (0.1, 0.1, 0.1)),
        plots.Point("b", "b", 3.7, (0.1, 0.1, 0.1)),
        plots.Point("c", "c", 8.0, (0.001, 0.001, 0.001)),
        plots.Point("d", "d", 0.0, (0.001, 0.001, 0.001)),
    ]
    figure = plots.quality_figure(points)
    assert figure is not None
    figure.draw_without_rendering()
    (long,) = [t for t in figure.axes[0].texts if "long" in t.get_text()]
    point = figure.axes[0].transData.transform((3.0, 0.1))
    assert long.get_window_extent().x1 < point[0]


def test_many_points_have_a_legend_of_series_that_all_look_different() -> None:
    points = [
        plots.Point(f"s{i}", f"s{i} {bits} bit", bits, (kl := 0.5**bits + i, kl, kl))
        for i in range(20)
        for bits in (1, 2, 4)
    ]
    figure = plots.quality_figure(points)
    assert figure is not None
    (legend,) = figure.legends
    names = [t.get_text() for t in legend.get_texts()]
    assert names == [f"s{i}" for i in reversed(range(20))]  # as the lines begin, from the top
    looks = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == 20
    assert not any(t.get_text().startswith("s") for t in figure.axes[0].texts)
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= figure.axes[0].bbox.x1


def test_nothing_to_plot() -> None:
    assert plots.quality_figure([plots.Point("x", "x", 16.0, (0.0, 0.0, 0.0))]) is None
    with pytest.raises(ValueError, match="no recall"):
        plots.passkey_figure([])


def test_passkey_panels_show_every_cell() -> None:
    maps = [
        plots.RecallMap(f"scheme {i}", {(0.0, 1024): 1.0, (0.5, 1024): 0.25, (0.5, 1500): i / 10})
        for i in range(6)
    ]
    figure = plots.passkey_figure(maps)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [m.label for m in maps]
    for i, axes in enumerate(panels):
        # Depth 0 at 1500 tokens was not asked.
        assert [t.get_text() for t in axes.texts] == ["100%", "25%", f"{i / 10:.0%}"]
    bottom = [t.get_text() for t in panels[-1].get_xticklabels()]
    assert bottom == ["1K", "1500"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["0%", "50%"]


def test_the_pareto_front_is_what_nothing_beats() -> None:
    points = [
        plots.Point("", name, size, (kl, kl, kl))
        for name, size, kl in (("a", 2, 0.1), ("b", 3, 0.2), ("c", 3, 0.05), ("d", 9, 0.05))
    ]
    assert [p.label for p in plots.pareto_front(points)] == ["a", "c"]
    figure = plots.pareto_figure(points, [True, False, True, False])
    assert figure is not None
    faces = [tuple(c.get_facecolors()[0][:3]) for c in figure.axes[0].collections]
    assert [face == (1.0, 1.0, 1.0) for face in faces] == [False, True, False, True]
    assert plots.pareto_figure([plots.Point("", "x", 1, (0.0, 0.0, 0.0))], [True]) is None


def test_numbers_of_a_crowd_overlap_nothing_and_a_legend_explains_them(tmp_path: Path) -> None:
    # Three at one place, and many of one size, as a run of every scheme has them.
    places = [(3.0, 0.05)] * 3 + [(3.0 + i % 4 / 20, 0.1 / 1.2**i) for i in range(30)]
    points = [plots.Point("", f"scheme {i}", x, (y, y, y)) for i, (x, y) in enumerate(places)]
    figure = plots.pareto_figure(points, [True] * len(points))
    assert figure is not None
    figure.savefig(tmp_path / "pareto.png")
    (axes,), (legend,) = figure.axes, figure.legends
    note, *numbers = axes.texts
    assert [t.get_text() for t in numbers] == [str(i) for i in range(1, 34)]
    named = [t.get_text().split("  ") for t in legend.get_texts()]
    assert [number for number, _ in named] == [t.get_text() for t in numbers]
    marks = [tuple(m.get_offsets()[0]) for m in axes.collections]
    held = {p.label: (p.bits, p.kl[0]) for p in points}
    assert marks == [held[label] for _, label in named] and len(held) == 33
    boxes = [t.get_window_extent() for t in (note, *numbers)]
    for i, box in enumerate(boxes):
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
        assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[:i]), i
        middles = axes.transData.transform(marks)
        # 46 square points of area: a radius of 3.8 points, 8 pixels.
        assert not any(box.padded(7).contains(x, y) for x, y in middles), i
    assert legend.get_window_extent().x0 >= axes.bbox.x1
    assert all(t.get_window_extent().x1 <= figure.bbox.x1 for t in legend.get_texts())


def test_data_without_plots_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*, complete: bool) -> list[Path]:
        found = dataclasses.replace(
            ablation(full=True), failed=(Failure("qjl", "E: a\nb"),), complete=complete
        )
        here = environment()
        return report.write_report(
            tmp_path, found, SCHEMES, settings=SETTINGS, environment=here, head_dim=128, plots=False
        )

    names = [file.name for file in written(complete=False)]
    assert names == ["ablation.csv", "ablation.json", "ablation.md"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    text = (tmp_path / "ablation.md").read_text()
    assert report.INCOMPLETE in text and "- `qjl`: E: a b" in text and "Passkeys:" not in text
    before = (tmp_path / "ablation.json").read_text()

    def cut_off(self: Path, data: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        written(complete=True)
    assert (tmp_path / "ablation.json").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == names
