"""The metrics of a run as a table: a list of records that also draws itself, in text and in a notebook.

table = result.metrics
table[-1]["loss"], table.column("loss"), table.to_pandas()
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from raytron.observe.records import Record

FIRST = ("step", "loss", "validation_loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "mfu")
SHOWN_ROWS = 10  # of a drawing: the first ones and the last ones


class Table(list[Record]):
    """Records in their order, one for each row."""

    @property
    def rows(self) -> list[Record]:
        """The records as a plain list."""
        return list(self)

    @property
    def columns(self) -> list[str]:
        """Every key that a record has, the well-known ones first."""
        known = dict.fromkeys(key for record in self for key in record)
        return [key for key in FIRST if key in known] + [key for key in known if key not in FIRST]

    def column(self, name: str) -> list[Any]:
        """One value of each row, None where a row has none. Raises KeyError for a column that no row has."""
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns) or 'none'}")
        return [record.get(name) for record in self]

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises ImportError without pandas."""
        return import_module("pandas").DataFrame(self.rows, columns=self.columns)

    def __str__(self) -> str:
        if not self:
            return "no rows"
        rows = [self.columns, *_shown(self)]
        widths = [max(len(row[index]) for row in rows) for index in range(len(self.columns))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _shown(self)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(table: Table) -> list[Sequence[str]]:
    """The cells of the first and the last rows, with a row of dots between where rows are left out."""
    columns = table.columns
    if len(table) <= SHOWN_ROWS:
        return [[cell(record.get(name)) for name in columns] for record in table]
    half = SHOWN_ROWS // 2
    first, last = ([[cell(r.get(name)) for name in columns] for r in part] for part in (table[:half], table[-half:]))
    return [*first, ["…"] * len(columns), *last]


def cell(value: Any) -> str:
    """A value for people: four significant digits of a fraction, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
