"""Draws a picture of a benchmark's table, `<name>.png` beside it.

    python benchmarks/plots.py [NAME ...]

`common.write_results` calls it; as a command it draws kept results again, all of them
or those named.
"""

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Plot:
    """Which columns of a table are drawn.

    With `x`, lines over a column of numbers; else bars, named by the columns `labels`,
    in one panel for each value of the columns `panels`.
    """

    values: tuple[str, ...]
    x: str | None = None
    labels: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()


# By the start of a result's name.
PLOTS = {
    "all_reduce": Plot(("ms",), labels=("what",)),
    "clip_length": Plot(
        (
            "joint attention, ms",
            "TokenLearner + MHSA, ms",
            "TokenLearner + vector attention, ms",
        ),
        x="frames",
    ),
    "cpu_profile": Plot(("ms",), labels=("forms",), panels=("work",)),
    "distributed": Plot(("examples/s",), labels=("devices",), panels=("precision",)),
    "distributed_jax": Plot(
        ("examples/s",), labels=("devices",), panels=("model", "precision")
    ),
    "export_latency": Plot(
        ("plain, images/s", "TokenLearner, images/s"), labels=("runtime", "batch")
    ),
    "export_quantized": Plot(("size, kB",), labels=("format", "weights")),
    "insertion": Plot(("ms without", "ms with"), labels=("image size",)),
    "rivals_layers": Plot(("ms",), labels=("layer",), panels=("input", "pass")),
    "rivals_models": Plot(("images/s",), labels=("model",), panels=("work",)),
    "tpu_compile": Plot(("memory, GiB",), labels=("topology",), panels=("model",)),
    "vit_resolution": Plot(("ViT, images/s", "TokenLearner ViT, images/s"), x="size"),
    "vit_speedup": Plot(("speed-up", "FLOPs ratio"), labels=("work", "size")),
    "vit_tokens": Plot(("images/s",), x="num_tokens"),
}


def number(cell):
    """The number that a cell begins with, or `None`."""
    try:
        return float(str(cell).split()[0])
    except (IndexError, ValueError):
        return None


def draw(name, title, rows, folder=RESULTS):
    """Draws the table of this name, if one knows how, and returns the path."""
    starts = [start for start in PLOTS if name.startswith(start)]
    if not starts:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot = PLOTS[max(starts, key=len)]
    panels = {}
    for row in rows:
        panels.setdefault(", ".join(str(row[c]) for c in plot.panels), []).append(row)
    longest = max(map(len, panels.values()))
    height = 4 if plot.x else 1 + 0.3 * longest * len(plot.values)
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(6 * columns, height * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (panel, part) in zip(axes.flat, panels.items()):
        if plot.x:
            _lines(axis, plot, part)
        else:
            _bars(axis, plot, part)
        axis.set_title(panel, fontsize=10)
    figure.suptitle(textwrap.fill(title, 50 * columns), fontsize=11)
    path = Path(folder) / f"{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _lines(axis, plot, rows):
    x = [number(row[plot.x]) for row in rows]
    for column in plot.values:
        axis.plot(x, [number(row[column]) for row in rows], "-o", label=column)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.set_xlabel(plot.x)
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize=8)


def _bars(axis, plot, rows):
    rows = [row for row in rows if number(row[plot.values[0]]) is not None]
    size = 0.8 / len(plot.values)
    for index, column in enumerate(plot.values):
        places = [i + index * size for i in range(len(rows))]
        numbers = [number(row[column]) for row in rows]
        bars = axis.barh(places, numbers, size, label=column, color=f"C{index}")
        axis.bar_label(bars, [f"{value:g}" for value in numbers], fontsize=7, padding=2)
    middle = size * (len(plot.values) - 1) / 2
    names = [", ".join(str(row[column]) for column in plot.labels) for row in rows]
    axis.set_yticks([i + middle for i in range(len(rows))], names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    if len(plot.values) > 1:
        axis.legend(fontsize=8)
    else:
        axis.set_xlabel(plot.values[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    for path in sorted(RESULTS.glob("*.json")):
        table = path.with_suffix(".md")
        if (names and path.stem not in names) or not table.exists():
            continue
        results = json.loads(path.read_text())
        if isinstance(results, dict) and "rows" in results:
            title = table.read_text().splitlines()[0].removeprefix("# ")
            print(draw(path.stem, title, results["rows"]) or f"{path.stem}: no plot")


if __name__ == "__main__":
    main()
