"""Metrics as a table: columns, text, HTML."""

import pytest

from raytron.observe.table import Table, cell


def table(rows):
    return Table({"tokens": 4096, "loss": 8.0 / step, "step": step} for step in range(1, rows + 1))


def test_a_table_is_a_list_of_its_records():
    assert table(3)[-1] == {"tokens": 4096, "loss": 8.0 / 3, "step": 3}
    assert table(3).rows == list(table(3))
    assert len(Table()) == 0


def test_columns_have_a_fixed_order_and_gaps_are_none():
    rows = Table([{"loss": 2.0, "extra": 1, "step": 1}, {"step": 2, "loss": 1.0, "mfu": 0.4}])
    assert rows.columns == ["step", "loss", "mfu", "extra"]
    assert rows.column("mfu") == [None, 0.4]
    with pytest.raises(KeyError, match="no column 'los'; there are step, loss"):
        rows.column("los")


def test_the_text_shows_the_ends_of_a_long_table():
    text = str(table(100)).splitlines()
    assert text[0].split() == ["step", "loss", "tokens"]
    assert [line.split()[0] for line in text[1:]] == ["1", "2", "3", "4", "5", "…", "96", "97", "98", "99", "100"]
    assert str(Table()) == "no rows"


def test_html_is_escaped():
    drawn = Table([{"step": 1, "<b>": "<script>"}])._repr_html_()
    assert "&lt;b&gt;" in drawn
    assert "<script>" not in drawn


def test_pandas_gets_the_columns_in_order():
    pytest.importorskip("pandas")
    frame = table(4).to_pandas()
    assert list(frame.columns) == ["step", "loss", "tokens"]
    assert frame["loss"].tolist() == table(4).column("loss")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (4.123456, "4.123"), (31234.5, "31,234"), (4096, "4,096"), (True, "True"), (3e-05, "3e-05")],
)
def test_cells_are_short(value, shown):
    assert cell(value) == shown
