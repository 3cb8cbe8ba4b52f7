"""The cost figures of the paper's Tables 1, 4 and 5, beside those of our models."""

import dataclasses
from collections.abc import Iterator

from tokenlearner_keras import models
from tokenlearner_keras.flops import count_flops


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table of the paper.

    Attributes:
        table: int. Number of the table.
        name: str. Name of the row, as the paper prints it.
        arguments: Arguments of the builder.
        gigaflops: float. The printed cost, in 1e9 (Table 1: multiply-adds and other
            arithmetic by halves, Tables 4 and 5: two for a multiply-add).
        parameters: float or `None`. The printed parameters, in 1e6.
        note: str. Why a row does not agree.
    """

    table: int
    name: str
    arguments: dict
    gigaflops: float
    parameters: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row with what was counted for it.

    Attributes:
        row: The `Row`.
        gigaflops: float. Our count.
        parameters: int. Our number of parameters.
    """

    row: Row
    gigaflops: float
    parameters: int

    @property
    def gigaflops_agree(self) -> bool:
        """Whether our count rounds to the printed figure."""
        return round(self.gigaflops, 1) == self.row.gigaflops

    @property
    def parameters_agree(self) -> bool | None:
        """Whether our parameters round to the printed figure; `None` if none is."""
        if self.row.parameters is None:
            return None
        return round(self.parameters / 1e6, 2) == self.row.parameters


def _vit(variant, num_layers=None, num_tokens=None):
    return {
        "variant": variant,
        "input_shape": (384, 384, 3),
        "num_layers": num_layers,
        "num_tokens": num_tokens,
    }


ROWS = (
    Row(1, "ViT S/32", _vit("S/32"), 3.4),
    Row(
        1,
        "ViT B/32",
        _vit("B/32"),
        19.8,
        note="the printed figure fits no 12 layers of B/32",
    ),
    Row(1, "ViT B/16", _vit("B/16"), 55.6),
    Row(1, "TokenLearner S/32", _vit("S/32", None, 8), 1.9),
    Row(
        1,
        "TokenLearner B/16",
        _vit("B/16", None, 8),
        28.7,
        note="the printed figure is that of 16 tokens",
    ),
    Row(1, "TokenLearner S/32 (22)", _vit("S/32", 22, 8), 3.3),
    Row(1, "TokenLearner B/32 (20)", _vit("B/32", 20, 8), 11.5),
    Row(1, "TokenLearner B/16 (21)", _vit("B/16", 21, 8), 47.1),
    Row(1, "16-TokenLearner B/16 (21)", _vit("B/16", 21, 16), 47.7),
    Row(4, "Joint space-time MHSA", {"name": "joint"}, 22.0, 0.30),
    Row(4, "Conv2D + Joint space-time MHSA", {"name": "conv2d+joint"}, 35.8, 1.98),
    Row(4, "Ours (TokenLearner)", {"name": "token_learner"}, 3.4, 0.81),
    Row(
        4, "Ours (Conv2D + TokenLearner)", {"name": "conv2d+token_learner"}, 17.2, 2.49
    ),
    Row(5, "Conv2D + Conv1D", {"name": "conv2d+conv1d"}, 18.3, 2.24),
    Row(5, "Conv2D + MLPMixer", {"name": "conv2d+mlp_mixer"}, 13.8, 2.06),
    Row(5, "Conv2D + Temporal transformer", {"name": "conv2d+temporal"}, 16.5, 1.98),
    Row(5, "Spatial + Temporal transformer", {"name": "spatial+temporal"}, 5.5, 0.59),
    Row(
        5,
        "Conv2D + Spatial + Temporal transformer",
        {"name": "conv2d+spatial+temporal"},
        19.2,
        2.27,
    ),
    Row(5, "Ours (TokenLearner)", {"name": "token_learner"}, 3.4, 0.81),
    Row(
        5,
        "Ours (SpatialT + TokenLearner)",
        {"name": "spatial+token_learner"},
        6.2,
        1.11,
    ),
    Row(
        5, "Ours (Conv2D + TokenLearner)", {"name": "conv2d+token_learner"}, 17.2, 2.49
    ),
)


def compare(tables: tuple[int, ...] = (1, 4, 5)) -> Iterator[Comparison]:
    """Builds and counts the models of the paper's tables, one row at a time.

    Args:
        tables: Numbers of the tables, of 1, 4 and 5.

    Yields:
        A `Comparison` for each row. TensorFlow backend only.
    """
    for row in ROWS:
        if row.table not in tables:
            continue
        if row.table == 1:
            model, convention = models.vit(**row.arguments), "xla"
        else:
            model = models.space_time_module(**row.arguments)
            convention = "tf_profiler"
        total = count_flops(model, convention).total
        yield Comparison(row, total / 1e9, model.count_params())


def print_tables(tables: tuple[int, ...] = (1, 4, 5), print_fn=print) -> bool:
    """Prints every cost figure of the tables beside ours.

    Args:
        tables: Numbers of the tables, of 1, 4 and 5.
        print_fn: Function that is called with each line.

    Returns:
        Whether every figure agrees, but for those that have a note.
    """
    titles = {
        1: "Table 1: ViT at 384 x 384, GFLOPS (half of XLA's flops)",
        4: "Table 4: modules at 64 x 8 x 8 x 432, GFLOPs (TensorFlow's profiler)",
        5: "Table 5: modules at 64 x 8 x 8 x 432, GFLOPs (TensorFlow's profiler)",
    }
    heading = (
        f"{'':40}{'GFLOPs':>8}{'ours':>9}  {'':5}{'params':>7}{'ours':>13}  {'':5}"
    )
    table, notes, agreed, figures, fine = None, [], 0, 0, True
    for comparison in compare(tables):
        row = comparison.row
        if row.table != table:
            table = row.table
            print_fn("")
            print_fn(titles[table])
            print_fn(heading.rstrip())
        mark = ""
        if row.note:
            notes.append(f"[{len(notes) + 1}] {row.name}: {row.note}.")
            mark = f" [{len(notes)}]"
        verdicts = [comparison.gigaflops_agree, comparison.parameters_agree]
        agreed += sum(verdict is True for verdict in verdicts)
        figures += sum(verdict is not None for verdict in verdicts)
        fine &= bool(row.note) or False not in verdicts
        printed = "" if row.parameters is None else f"{row.parameters:.2f}M"
        print_fn(
            (
                f"{row.name + mark:40}{row.gigaflops:8.1f}{comparison.gigaflops:9.3f}  "
                f"{_verdict(verdicts[0]):5}{printed:>7}{comparison.parameters:13,}  "
                f"{_verdict(verdicts[1]):5}"
            ).rstrip()
        )
    print_fn("")
    for note in notes:
        print_fn(note)
    print_fn(f"{agreed} of {figures} figures agree to the printed digit.")
    return fine


def _verdict(agrees):
    return {None: "", True: "ok", False: "DIFF"}[agrees]
