"""The table of a finding: estimates with intervals, which are printed and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vicrop.evaluation.columns import print_aligned
from vicrop.evaluation.statistics import bootstrap_interval
from vicrop.plots import bars_figure, curves_figure

ROUNDS = 2000  # of the bootstrap
Estimate = dict[str, Any]  # "mean", "low", "high" (None without values), "n"


@dataclass
class Table:
    """A finding: each row has an estimate of each series, in one unit; notes say in words what follows."""

    title: str
    rows_are: str  # "layer"
    unit: str
    rows: dict[Any, dict[str, Estimate]]  # row -> {series: estimate}
    notes: list[str] = field(default_factory=list)
    plotted: tuple[str, ...] = ()  # the series that are drawn; all if empty
    digits: int = 1  # after the point
    turned: bool = False  # are bars grouped by series, and `plotted` names rows?
    even: float | None = None  # the value that means "no difference"; if given, the axis is logarithmic


def estimate(values: Sequence[float], images: Sequence[str]) -> Estimate:
    """{"mean", "low", "high", "n"}: with the 95 % interval of a bootstrap over images."""
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = bootstrap_interval(np.asarray(values, dtype=float), images, ROUNDS, seed=0)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def in_words(found: Estimate, digits: int = 1) -> str:
    """An estimate as a text: its mean and its interval."""
    if not found["n"]:
        return "-"
    mean, low, high = (f"{found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def show(table: Table) -> None:
    """Print a Table."""
    series = list(next(iter(table.rows.values())))
    print(f"{table.title} ({table.unit}, 95 % intervals by bootstrap over images)")
    lines = [[table.rows_are, *series, "n"]]
    for name, found in table.rows.items():
        counts = dict.fromkeys(str(each["n"]) for each in found.values())
        lines.append([str(name), *(in_words(found[each], table.digits) for each in series), "/".join(counts)])
    print_aligned(lines, left=1)
    for note in table.notes:
        print(note)


def turned(rows: dict[Any, dict[str, Estimate]]) -> dict[str, dict[Any, Estimate]]:
    """{series: {row: estimate}} of {row: {series: estimate}}."""
    return {name: {row: series[name] for row, series in rows.items()} for name in next(iter(rows.values()))}


def figure(table: Table, title: str) -> Figure:
    """The plot of a Table: curves over layers, bars over anything else."""
    rows = turned(table.rows) if table.turned else table.rows
    rows = {row: {name: found for name, found in series.items() if not table.plotted or name in table.plotted}
            for row, series in rows.items()}  # fmt: skip
    if table.rows_are == "layer":
        return curves_figure(rows, table.rows_are, table.unit, title, table.even)
    return bars_figure(rows, table.unit, title)
