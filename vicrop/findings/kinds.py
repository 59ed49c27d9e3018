"""Right answers by the kind of question: which gain from a crop, which do not, which lose, and what repairs that.

It is made of results of `vicrop run`: those of one region lie in --save_path, those of more in folders in it. So it
goes on after a kill, and uses what has been answered before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vicrop.choices import Regions, wants_crop
from vicrop.dataset import Id, pick
from vicrop.evaluation.confidence import has_confidence, sureness, why_without
from vicrop.evaluation.ensembles import chosen_by_rules, votes_of
from vicrop.evaluation.paired import Common, in_common
from vicrop.evaluation.result_files import ResultFile, result_path
from vicrop.evaluation.runner import run_task
from vicrop.evaluation.scores import ScoreOptions
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import questions_of
from vicrop.files import atomic_path, write_atomically
from vicrop.findings.measure import (
    NO_CROP,
    TRUE_CROP,
    file_of,
    images_of,
    settings_of,
    where_places_are_true,
    with_methods,
)
from vicrop.findings.sample import chosen
from vicrop.findings.table import Estimate, Table, estimate, in_words
from vicrop.tables import METHODS

GATE = 0.9  # a crop is made only where the first answer is less probable
MOST_REGIONS = 3
TOGETHER = ("rel_att", "grad_att", "loc_att")  # whose answers are one ensemble, the first answer with them
GRID = "grid_crops"
BESIDE = ("question_att", TRUE_CROP, GRID)  # asked with several regions, too, where they are among the methods
ENSEMBLE, ALL, REGIONS = "ensemble", "all", " regions"
SHOWN = 3  # ways that repair a kind, at most


@dataclass(frozen=True)
class Ways:
    """The scores of what was answered in different ways, about the questions that have one in all of them.

    Attributes:
        scores: {way: (n,) scores}; the first way is without a crop. main: the way that others are held against.
        repairs: the ways that may repair what `main` does. members: the ways that the ensemble chooses from.
        kinds: of each question its kinds, mostly one; images: its image.
    """

    scores: Mapping[str, np.ndarray]
    main: str
    repairs: Sequence[str]
    members: Sequence[str]
    kinds: Sequence[Sequence[str]]
    images: Sequence[str]

    def of(self, kind: str, scores: np.ndarray) -> Estimate:
        """The estimate of the scores of one kind of questions, or of ALL."""
        chosen = [number for number, own in enumerate(self.kinds) if kind == ALL or kind in own]
        return estimate(scores[chosen].tolist(), [self.images[number] for number in chosen])

    def change(self, kind: str, way: str, other: str) -> Estimate:
        """The estimate of the difference between two ways, question by question."""
        return self.of(kind, self.scores[way] - self.scores[other])

    @property
    def names(self) -> list[str]:
        """The kinds by name, and ALL."""
        return [*sorted({kind for own in self.kinds for kind in own}), ALL]

    def rows(self) -> dict[str, dict[str, Estimate]]:
        """{way: {kind: its scores}}."""
        return {way: {kind: self.of(kind, scores) for kind in self.names} for way, scores in self.scores.items()}

    def changes(self, than: Mapping[str, str]) -> dict[str, dict[str, Estimate]]:
        """{way: {kind: its difference to another way}}, given {way: the other}."""
        return {way: {kind: self.change(kind, way, other) for kind in self.names} for way, other in than.items()}


# ------------------------------------------------------------------------------------------------------------- answers
def kinds(run: RunSettings, out: Path) -> Table:
    """Right answers by the field `category` of the records, without a crop and in all ways to make crops.

    Raises:
        ValueError: no record has a category; the first method makes no map.
    """
    picked = pick(questions_of(run), run.ids, run.limit)
    records = [record for record in picked if record.get("category")]
    if not records:
        raise ValueError(f"{run.question_path}: no record has a `category`, the kind of its question: in a clone, "
                         "python -m tiny.sets makes records that have")  # fmt: skip
    main = run.how.names[0]
    if "map" not in METHODS[main]:
        raise ValueError(f"--method {main}: the first method must make a map, since it is asked with several regions")
    names, notes = where_places_are_true(records, run.how.names)
    if len(records) < len(picked):
        notes.append(f"{len(picked) - len(records)} of {len(picked)} records have no category, and are not asked about")
    if not (run.ids or run.limit):
        records, run = sampled(records, run, out)
    beside = [name for name in BESIDE if name in names and name != main]
    files = dict(answered(run, [name for name in names if name != GRID]))  # one part of a grid is the whole image
    for most in range(2, MOST_REGIONS + 1):
        files |= {f"{name}, {most}{REGIONS}": file for name, file in answered(run, [main, *beside], most)}
    ways = ways_of(files, main, run, {record["id"] for record in records})
    if len(ways.kinds) < len(records):
        notes.append(f"{len(records) - len(ways.kinds)} of {len(records)} questions have no score in some way, and are "
                     "left out")  # fmt: skip
    table = table_of(ways, notes)
    table.settings = settings_of(run, out) | {"region_share": run.how.regions.share, "most_regions": MOST_REGIONS,
                                              "crop_below": GATE, "ensemble": list(ways.members)}  # fmt: skip
    write_markdown(table, file_of(run, out, "kinds", ".md"))
    return table


def sampled(records: list[dict], run: RunSettings, out: Path) -> tuple[list[dict], RunSettings]:
    """The finding's sample of the records, and the run that asks about it only: --ids has them, in a file in `out`."""
    sample = chosen(records, "kinds")
    path = file_of(run, out, "kinds", ".ids.json")
    write_atomically(path, [record["id"] for record in sample])
    return sample, replace(run, ids=str(path))


def table_of(ways: Ways, notes: Sequence[str] = ()) -> Table:
    """The Table of the ways, and those of their differences to no crop and to the main way."""
    shown = [NO_CROP, ways.main, f"{ways.main}, 2{REGIONS}", gated(ways.main), ENSEMBLE, TRUE_CROP]
    shown = [way for way in shown if way in ways.scores]
    how = {"rows_are": "method", "turned": True}
    table = Table("right answers by kind of question", unit="% right", rows=ways.rows(), plotted=tuple(shown),
                  notes=[*notes, *sentences(ways)], **how)  # fmt: skip
    for name, than in (("against_no_crop", NO_CROP), ("against_crop", ways.main)):
        rows = ways.changes({way: than for way in ways.scores if way != than})
        drawn = tuple(way for way in shown if way in rows)
        table.more[name] = Table(f"difference to {than}", unit="points", rows=rows, plotted=drawn, **how)
    one_region = {way: way.partition(", ")[0] for way in ways.scores if way.endswith(REGIONS)}
    rows = ways.changes({way: one for way, one in one_region.items() if one in ways.scores})
    if rows:
        table.more["against_one_region"] = Table("difference to one region", unit="points", rows=rows, **how)
    return table


def answered(run: RunSettings, names: Sequence[str], most: int = 1) -> Iterator[tuple[str, ResultFile]]:
    """Yield (method, its result) with up to so many regions; what has been answered before is not asked again."""
    if most > 1:
        how = replace(run.how, regions=Regions(most, run.how.regions.share))
        run = replace(run, how=how, save_path=run.save_path / f"regions_{most}")
    run = with_methods(run, names)
    run_task(run)  # uses results that exist, or refuses them if their settings differ
    for name in run.how.names:
        yield name, ResultFile.read(result_path(run.save_path, run.model.name, run.task, name))


# -------------------------------------------------------------------------------------------------------------- scores
def gated(main: str) -> str:
    """The name of a method's gated way."""
    return f"{main} below {GATE:g}"


def ways_of(files: Mapping[str, ResultFile], main: str, run: RunSettings, wanted: set[Id]) -> Ways:
    """The Ways of some results, about these records.

    Raises:
        ValueError: no record has a score in all of them; one does not tell how sure the model was.
    """
    members = [way for way in TOGETHER if way in files]
    for way in dict.fromkeys((main, *members)):
        if not has_confidence(files[way].records):
            raise ValueError(why_without(files[way]))
    metric, results = next(iter(run.metrics)), list(files.values())
    common = next((each for each in in_common(results, ScoreOptions()) if each.metric == metric), None)
    kept = [number for number, record in enumerate(common.records[0]) if record["id"] in wanted] if common else []
    if common is None or not kept:
        raise ValueError(f"{run.question_path}: no record with a category has a score by {metric} in all ways")
    records = {way: [own[number] for number in kept] for way, own in zip(files, common.records, strict=True)}
    pairs = {way: np.array(own, float)[kept] for way, own in zip(files, common.pairs, strict=True)}  # (n, 2)
    (before, after), sure = pairs[main].T, np.array([sureness(record) or (0.0, 0.0) for record in records[main]])
    cropped = np.array([wants_crop(p, GATE) for p in sure[:, 0]])
    scores = {NO_CROP: before, **{way: own[:, 1] for way, own in pairs.items()}}
    scores[gated(main)] = np.where(cropped, after, before)
    scores[f"{main}, the surer answer"] = np.where(sure[:, 1] >= sure[:, 0], after, before)
    if len(members) > 1:
        shared = Common(metric, [records[way] for way in members], [list(map(tuple, pairs[way])) for way in members], 0)
        scores[ENSEMBLE] = chosen_by_rules(votes_of([files[way] for way in members], shared))["highest p"]
    repairs = [way for way in scores if way not in {NO_CROP, *METHODS} and not way.startswith((TRUE_CROP, GRID))]
    return Ways(
        scores, main, repairs, [NO_CROP, *members], list(map(kinds_of, records[main])), images_of(records[main])
    )


def kinds_of(record: dict) -> list[str]:
    """The kinds of a question: a list of them may stand in its record."""
    kinds = record["category"]
    return [str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]


# ------------------------------------------------------------------------------------------------------------ in words
def sentences(ways: Ways) -> Iterator[str]:
    """Yield for each kind what the main method's crop does to it, and which ways are better than that; the ensemble."""
    for kind in ways.names:
        change = ways.change(kind, ways.main, NO_CROP)
        what = "gains" if change["low"] > 0 else "loses" if change["high"] < 0 else "does not change"
        better = {way: ways.change(kind, way, ways.main) for way in ways.repairs}
        best = sorted((way for way, found in better.items() if found["low"] > 0), key=lambda way: -better[way]["mean"])
        still = {way: ways.change(kind, way, NO_CROP)["high"] < 0 for way in best}
        repaired = ", ".join(f"{way} by {in_words(better[way])}" + ", but still below no crop" * still[way]
                             for way in best[:SHOWN])  # fmt: skip
        rest = f"; better than that: {repaired}" if best else "; nothing is better than that"
        yield f"{kind} {what} with {ways.main} ({in_words(change)} points){rest}"
    if ENSEMBLE in ways.scores:
        best = max(ways.members, key=lambda way: ways.scores[way].mean())
        change = in_words(ways.change(ALL, ENSEMBLE, best))
        yield f"the {ENSEMBLE} against its best member, {best}: {change} points"


def write_markdown(table: Table, path: Path) -> None:
    """All tables of a finding in Markdown, that of the ways that are plotted first, and what they say in words."""
    parts = [markdown(table, table.plotted), markdown(table), table.notes, *map(markdown, table.more.values())]
    text = "\n\n".join("\n".join(part) for part in parts)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def markdown(table: Table, ways: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of a Markdown table of some ways, or of all: in %, with half of the interval, or in points."""
    names = list(next(iter(table.rows.values())))
    yield f"| {'' if '%' in table.unit else f'{table.title} '}| {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for way in ways or table.rows:
        cells = [cell(table.rows[way][kind], table.unit) for kind in names]
        yield f"| {way} | {' | '.join(cells)} |"


def cell(found: Estimate, unit: str) -> str:
    """An estimate in a cell: `81.0 ± 3.2`, and a difference as `+1.2 [-0.4, +2.9]`."""
    if "%" in unit:
        return f"{found['mean']:.1f} ± {(found['high'] - found['low']) / 2:.1f}"
    return f"{found['mean']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
