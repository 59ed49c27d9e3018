"""The table of docs/models.md: what `vicrop check` finds of a small random-weight model of each family.

python tests/table_of_families.py [FAMILY ...]
"""

import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from families import FAMILIES  # noqa: E402 (the path has to be known first)

from vicrop.checkpoints import quiet_libraries  # noqa: E402
from vicrop.verify import Report, verify  # noqa: E402


def row_of(name: str, report: Report) -> str:
    """A row of the table: the worst error of each kind over the pictures."""
    errors = [each.errors for each in report.pictures]
    names = dict.fromkeys(name for each in errors for name in each)
    worst = {name: max(each[name] for each in errors if name in each) for name in names}
    first = report.pictures[0]
    shown = [f"{error:.0e}" for error in worst.values()]
    verdict = "; ".join(report.differs) or "equal"
    return f"| {name} | {first.layout} | {'yes' if first.shared else 'no'} | {' | '.join(shown)} | {verdict} |"


def main() -> None:
    """Print the table."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    heads = None
    for name in sys.argv[1:] or FAMILIES:
        report = verify(*FAMILIES[name]())
        if heads is None:
            heads = list(report.pictures[0].errors)
            print(f"| family | layout checked | prefix shared | {' | '.join(heads)} | |")
            print("|" + "---|" * (len(heads) + 4))
        print(row_of(name, report), flush=True)


if __name__ == "__main__":
    main()
