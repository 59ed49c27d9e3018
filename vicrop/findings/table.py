"""The table of a finding: estimates with intervals, which are printed and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vicrop.evaluation.columns import print_aligned
from vicrop.evaluation.statistics import bootstrap_interval
from vicrop.plots import bars_figure, curves_figure, points_figure

ROUNDS = 2000  # of the bootstrap
Estimate = dict[str, Any]  # "mean", "low", "high" (None without values), "n"


@dataclass
class Table:
    """A finding: each row has an estimate of each series, in one unit; notes say in words what follows.

    Without rows it has no meaning for the model that was asked about: the notes say why.
    """

    title: str
    rows_are: str  # "layer"
    unit: str
    rows: dict[Any, dict[str, Estimate]]  # row -> {series: estimate}
    notes: list[str] = field(default_factory=list)
    plotted: tuple[str, ...] = ()  # the series that are drawn; all if empty
    digits: int = 1  # after the point
    turned: bool = False  # are bars grouped by series, and `plotted` names rows?
    even: float | None = None  # the value that means "no difference"; if given, the axis is logarithmic
    curves: bool = False  # are rows numbers, over which the series are drawn?
    against: tuple[str, ...] = ()  # series that are axes: then rows are points, "A at 1" and "A at 2" of one curve
    more: dict[str, "Table"] = field(default_factory=dict)  # further tables, each by its name
    intervals: str = "by bootstrap over images"  # how the 95 % intervals are made
    settings: dict[str, Any] = field(default_factory=dict)  # of its measurements, where the run's own are not theirs


def estimate(values: Sequence[float] | np.ndarray, images: Sequence[str]) -> Estimate:
    """{"mean", "low", "high", "n"}: with the 95 % interval of a bootstrap over images."""
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = bootstrap_interval(np.asarray(values, dtype=float), images, ROUNDS, seed=0)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def difference(first: Sequence[float], second: Sequence[float], images: Sequence[str]) -> Estimate:
    """The `estimate` of first - second, pair by pair."""
    return estimate(np.subtract(first, second), images)


def in_words(found: Estimate, digits: int = 1) -> str:
    """An estimate as a text: its mean and its interval."""
    if not found["n"]:
        return "-"
    mean, low, high = (f"{found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def show(table: Table) -> None:
    """Print a Table, and those that belong to it."""
    series = list(next(iter(table.rows.values()), ()))
    print(f"{table.title} ({table.unit}, 95 % intervals {table.intervals})")
    lines = [[table.rows_are, *series, "n"]]
    for name, found in table.rows.items():
        counts = dict.fromkeys(str(each["n"]) for each in found.values())
        lines.append([str(name), *(in_words(found[each], table.digits) for each in series), "/".join(counts)])
    if table.rows:
        print_aligned(lines, left=1)
    for note in table.notes:
        print(note)
    for other in table.more.values():
        print()
        show(other)


def turned(rows: dict[Any, dict[str, Estimate]]) -> dict[str, dict[Any, Estimate]]:
    """{series: {row: estimate}} of {row: {series: estimate}}."""
    return {name: {row: series[name] for row, series in rows.items()} for name in next(iter(rows.values()))}


def figure(table: Table, title: str) -> Figure:
    """The plot of a Table: curves over numbers, points over what is paid for them, bars over anything else."""
    if table.against:
        return points_figure(table.rows, table.against, table.plotted[0], title)
    rows = turned(table.rows) if table.turned else table.rows
    rows = {row: {name: found for name, found in series.items() if not table.plotted or name in table.plotted}
            for row, series in rows.items()}  # fmt: skip
    if table.curves:
        return curves_figure(rows, table.rows_are, table.unit, title, table.even)
    return bars_figure(rows, table.unit, title)
