"""The score table in columns, for the terminal, the report files and the page."""

from collections.abc import Iterator, Sequence
from typing import Any

COLUMNS = ("task", "model", "method", "metric", "part", "n", "missing", "errors", "without crop", "with crop",
           "difference", "95 % interval", "p", "fixed", "broken", "surer")  # fmt: skip
LEFT = 5  # columns that are flush left


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row of the table."""
    shown = {name: row.get(name, "") for name in COLUMNS}
    if "difference" in row:
        shown |= {"without crop": f"{row['without_crop']:.2f}", "with crop": f"{row['with_crop']:.2f}",
                  "difference": f"{row['difference']:+.2f}",
                  "95 % interval": f"{row['low']:+.2f} to {row['high']:+.2f}"}  # fmt: skip
    if "surer" in row:
        shown["surer"] = f"{row['surer']:.2f}"
    if "mcnemar_p" in row:
        shown["p"] = f"{row['mcnemar_p']:.2g}"
    return [str(shown[name]) for name in COLUMNS]


def print_aligned(lines: Sequence[Sequence[str]], left: int) -> None:
    """Print lines of texts in columns, the first `left` of them flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        words = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(words).rstrip())


def details_of(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each row that has figures beyond the table's columns, or records that are not in its n."""
    for row in rows:
        about = f"{row['task']} {row['model']} {row['method']} {row['metric']} {row['part']}"
        if "unscored" in row:
            yield f"{about}: {row['unscored']} records cannot be scored and are not in n"
        details = [f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                   for name, value in row.items() if "," in name]  # fmt: skip
        if details:
            yield f"{about}: {'; '.join(details)}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print_aligned([COLUMNS, *map(cells, rows)], LEFT)
    print("".join(f"{line}\n" for line in details_of(rows)), end="")
    print("Scores in %; intervals by bootstrap over images; p: McNemar's exact test. A record with an error is wrong. "
          "surer: of both answers the more probable one.")  # fmt: skip
