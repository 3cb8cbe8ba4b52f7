import pytest

from tokenlearner_keras import tables

pytestmark = pytest.mark.tensorflow


def test_tables_4_and_5_agree_in_all_20_figures_of_their_rows():
    comparisons = list(tables.compare((4, 5)))
    assert [c.row.table for c in comparisons] == [4] * 4 + [5] * 8
    assert all(c.gigaflops_agree and c.parameters_agree for c in comparisons)
    # Two rows stand in both tables.
    modules = {c.row.arguments["name"] for c in comparisons}
    assert len(modules) == 10


def test_rows_of_table_1():
    rows = [row for row in tables.ROWS if row.table == 1]
    assert [row.gigaflops for row in rows] == [
        3.4, 19.8, 55.6, 1.9, 28.7, 3.3, 11.5, 47.1, 47.7,
    ]  # fmt: skip
    assert [row.name for row in rows if row.note] == ["ViT B/32", "TokenLearner B/16"]


def test_print_tables(monkeypatch):
    row = tables.ROWS[0]
    monkeypatch.setattr(tables, "ROWS", (row, tables.ROWS[1], tables.ROWS[11]))
    lines = []
    assert tables.print_tables(print_fn=lines.append)
    assert lines[-1] == "3 of 4 figures agree to the printed digit."
    assert lines[-2].startswith("[1] ViT B/32: the printed figure fits no 12 layers")
    s32 = next(line for line in lines if line.startswith("ViT S/32"))
    assert s32.split() == ["ViT", "S/32", "3.4", "3.443", "ok", "22,914,664"]
    assert "DIFF" in next(line for line in lines if line.startswith("ViT B/32 [1]"))


def test_an_unexplained_difference_is_reported(monkeypatch):
    row = tables.Row(5, "Wrong", {"name": "token_learner"}, 3.5, 0.81)
    monkeypatch.setattr(tables, "ROWS", (row,))
    lines = []
    assert not tables.print_tables(print_fn=lines.append)
    assert "DIFF" in lines[-3]
