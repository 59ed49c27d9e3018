"""The tables of docs/architectures.md: what `vicrop check` finds of a small random-weight model of each family.

python tests/table_of_families.py [FAMILY ...]     # measure them (default: all that can be built here), write the page
python tests/table_of_families.py --write          # only write the page, from what was measured

Figures are kept in tests/families.json: some families are measured in an environment with torchvision.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402 (the path has to be known first)
import transformers  # noqa: E402
from builders import build_blip, build_llava, build_llava_next, build_qwen2_5  # noqa: E402
from families import FAMILIES  # noqa: E402

from vicrop.checkpoints import quiet_libraries  # noqa: E402
from vicrop.files import read_json  # noqa: E402
from vicrop.guard import ADMITTED  # noqa: E402
from vicrop.refusals import CHECKED, REFUSED  # noqa: E402
from vicrop.verify import BOUNDS, Report, verify  # noqa: E402

KEPT, PAGE = HERE / "families.json", HERE.parent / "docs" / "architectures.md"
OLDER = {"llava": build_llava, "llava_next": build_llava_next, "instructblip": build_blip, "qwen2_5_vl": build_qwen2_5}
MORE = {"families_tiles": ("TILES",), "families_rasters": ("RASTERS", "WITH_TORCHVISION")}  # module -> its tables
BEGIN, END = "<!-- made by tests/table_of_families.py -->", "<!-- until here -->"


def builders() -> dict[str, Any]:
    """Of every family that is carried what builds a small model."""
    found = dict(OLDER | FAMILIES)
    for module, names in MORE.items():
        if (HERE / f"{module}.py").exists():
            for name in names:
                found |= getattr(importlib.import_module(module), name)
    return found


def kept() -> dict[str, Any]:
    """What was measured before, by family."""
    return read_json(KEPT) if KEPT.exists() else {}


def keep(figures: dict[str, Any]) -> None:
    """Write what was measured, a line for each family."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(figures.items())]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def row_of(report: Report) -> dict[str, Any]:
    """What is kept of a family: the worst error of each kind over the pictures."""
    errors = {name: max(each.errors[name] for each in report.pictures) for name in report.pictures[0].errors}
    first = report.pictures[0]
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return {"errors": {name: float(f"{error:.1g}") for name, error in errors.items()}, "layout": first.layout,
            "shared": bool(first.shared), "made_by": made_by, "differs": report.differs}  # fmt: skip


def page_with(page: str, figures: dict[str, Any]) -> str:
    """The text of the page, with its tables made anew."""
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return "\n".join([before + BEGIN, *tables(figures), END + after])


def tables(figures: dict[str, Any]) -> list[str]:
    """Lines: the carried ones with their figures, those that are refused, those that are checked at first use."""
    lines = ["", f"**Carried: {len(figures)}.**", "", f"| `model_type` | prefix shared | {' | '.join(BOUNDS)} |"]
    lines.append("|---" * (len(BOUNDS) + 2) + "|")
    for name, row in sorted(figures.items()):
        shown = [f"{row['errors'][what]:.0e}" if what in row["errors"] else "none" for what in BOUNDS]
        lines.append(f"| `{name}` | {'yes' if row['shared'] else 'no'} | {' | '.join(shown)} |")
    for title, those in (("Refused, with this reason", REFUSED), ("Compared at first use", CHECKED)):
        lines += ["", f"**{title}: {len(those)}.**", "", "| `model_type` | |", "|---|---|"]
        lines += [f"| `{name}` | {reason} |" for name, reason in sorted(those.items())]
    return [*lines, ""]


def main(names: list[str]) -> None:
    """Measure families, and write what was measured and the page."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    figures, small = kept(), builders()
    for name in names or small:
        try:
            model, processor = small[name]()
            setattr(model, ADMITTED, True)
            figures[name] = row_of(verify(model, processor))
        except ImportError as error:
            print(f"{name}: not here ({str(error).strip().splitlines()[0]})")
            continue
        print(name, figures[name]["errors"], figures[name]["differs"] or "equal", flush=True)
        keep(figures)
    PAGE.write_text(page_with(PAGE.read_text(), figures))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with(PAGE.read_text(), kept()))
    else:
        main(sys.argv[1:])
