"""Makes data/<dataset>/ of a benchmark's official files: questions in the toolkit's format, and the images.

    vicrop prepare textvqa --source DIR                      # the files of the official release, anywhere below DIR
    vicrop prepare pope --download                           # fetch the public files first, into data/<dataset>/source
    vicrop prepare vqav2 --source DIR --sample 5000 --seed 0

Nothing is written before all images have been found.
"""

# A field that is optional in other records is not in a released file: pyright takes that for an oversight.
# pyright: reportGeneralTypeIssues=false

import filecmp
import gzip
import os
import random
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from tqdm import tqdm

from vicrop.command_line import CommandParser, gigabytes
from vicrop.dataset import (
    Id,
    Question,
    Text,
    box_of,
    box_xywh_to_xyxy,
    checked,
    field_of,
    load_task,
    name_of,
    refuse_bad_ids,
    refuse_misplaced,
    refuse_other_size,
    shown,
)
from vicrop.evaluation.metrics import choices
from vicrop.files import in_repository, read_json, read_rows, write_atomically
from vicrop.images import size_as_seen
from vicrop.prepare.download import CHUNK, Unavailable, download, size_of
from vicrop.tables import TASKS

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


# ------------------------------------------------------------------------------------------------------ official files
class Source:
    """A folder that has a release's files, at any depth, under their official names."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"no folder {folder}: --source must be the folder of the official files")
        self.at = ""  # the file and entry that is being converted, for error messages
        self.by_name: dict[str, list[Path]] = {}
        seen = set()  # folders: links may lead in a circle
        for below, inner, names in os.walk(self.folder, followlinks=True):
            if os.path.realpath(below) in seen:
                inner.clear()
                continue
            seen.add(os.path.realpath(below))
            for name in names:
                self.by_name.setdefault(name, []).append(Path(below) / name)

    def find(self, pattern: str) -> Path:
        """The only file whose name matches; a ValueError if there is none, or more than one."""
        found = sorted(path for paths in self.by_name.values() for path in paths if path.match(pattern))
        if len(found) != 1:
            names = ", ".join(str(path.relative_to(self.folder)) for path in found[:5]) or "none"
            packed = "" if found else self.packed(lambda member: member.match(pattern))
            raise ValueError(f"{self.folder} must hold one {pattern}, found: {names}{packed}")
        return found[0]

    def json(self, pattern: str) -> Any:
        """The content of the only JSON file whose name matches."""
        return read_json(self.find(pattern))

    def lines(self, pattern: str) -> list[dict[str, Any]]:
        """The objects of the only file of JSON lines whose name matches."""
        return read_rows(self.find(pattern))

    def each(self, entries: Iterable[Any], where: str, field: str) -> Iterator[Any]:
        """Yield the entries of the file `where`; meanwhile `at` names the entry, by its `field` if it has that."""
        for number, entry in enumerate(entries):
            named = isinstance(entry, dict) and field in entry
            self.at = f"{where}: " + (f"{field} {shown(entry[field])}" if named else f"entry {number}")
            yield entry
        self.at = ""

    def image(self, name: str) -> Path | None:
        """The file of an image, by its official name, which may begin with folders; None if it is missing.

        Raises:
            ValueError: there are several such files, and they differ.
        """
        found = [path for path in self.by_name.get(Path(name).name, ()) if path.as_posix().endswith("/" + name)]
        if not all(filecmp.cmp(found[0], other, shallow=False) for other in found[1:]):
            raise ValueError(
                f"which one is {name}? {', '.join(map(str, found[:5]))} differ: choose a --source with one of them"
            )
        return min(found, default=None)

    def packed(self, is_wanted: Callable[[PurePosixPath], bool]) -> str:
        """The end of an error about missing files: which archive has one and must be unpacked; "" if none has.

        Args:
            is_wanted: is this member of an archive one of the missing files?
        """
        archives = [path for name, paths in self.by_name.items() if name.lower().endswith(ARCHIVES) for path in paths]
        for path in sorted(archives):
            member = next((each for each in map(PurePosixPath, members_of(path)) if is_wanted(each)), None)
            if member:
                return f"; {path} has {member}: unpack it there"
        return ""


def members_of(path: Path) -> list[str]:
    """The names of the members of a zip or tar archive; no names if it is broken."""
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()
        with tarfile.open(path) as archive:
            return archive.getnames()
    except (zipfile.BadZipFile, tarfile.TarError, OSError, zlib.error, EOFError):
        return []


# ------------------------------------------------------------------------------------------------------ official types
class ByNumber(msgspec.Struct):
    """The ids in the datasets about COCO's images."""

    question_id: Id
    image_id: Annotated[int, Meta(ge=0, description="{} is a whole number")]


class ByName(msgspec.Struct):
    """The ids in the other datasets."""

    question_id: Id
    questionId: Id  # noqa: N815 (DocVQA's name)
    dataset_id: Id
    image_id: Text
    imageId: Id  # noqa: N815 (GQA's name)


class Listed(Question, kw_only=True):
    """A record with all answers of its annotators."""

    labels: Annotated[
        Annotated[list[str], Meta(min_length=1)], Meta(description="labels are a list of texts that is not empty")
    ]


class Single(Question, kw_only=True):
    """A record with the one right answer."""

    labels: Annotated[str, Meta(pattern=r"\S", description="labels are a text that is not empty")]


class YesOrNo(Single, kw_only=True):
    """A record of POPE: the label is yes or no."""

    labels: Annotated[str, Meta(pattern=r"^(?i:yes|no)\Z", description='labels are "yes" or "no"')]


class Letter(Single, kw_only=True):
    """A record of V*: the label is the letter of an option."""

    category: Text

    def __post_init__(self):
        choices(self.question, self.labels)


class WithChoices(Listed, kw_only=True):
    """A record of A-OKVQA: also the choices of its multiple choice."""

    choices: Annotated[list[Text] | None, Meta(description="{} are a list of texts")] = None
    correct_choice_idx: Annotated[int | None, Meta(description="{} is the number of a choice")] = None
    difficult_direct_answer: Annotated[bool | None, Meta(description="{} is true or false")] = None

    def __post_init__(self):
        right = self.correct_choice_idx
        if self.choices is not None and not (right is not None and 0 <= right < len(self.choices)):
            raise ValueError(
                f"correct_choice_idx is the number of a choice (0 to {len(self.choices) - 1}), not {right}"
            )


def official(entry: dict, field: str, kind: type) -> str | int:
    """A field of an official entry that has its id or that of its image; an error shows the entry."""
    if field not in entry:
        raise KeyError(field)
    return field_of(entry, field, kind, f"entry {shown(entry)}")


# ---------------------------------------------------------------------------------------------------------- converters
# Each takes a Source and yields records; image_path is the official name of the image.
def textvqa(source: Source) -> Iterator[dict[str, Any]]:
    """TextVQA 0.5.1, validation; with gt_bbox if the source also has jrzhang/TextVQA_GT_bbox, as JSON or JSON lines."""
    boxes = {}
    if any(Path(name).match("*TextVQA_GT_bbox*.json*") for name in source.by_name):
        path = source.find("*TextVQA_GT_bbox*.json*")
        rows = read_rows(path)
        refuse_bad_ids(rows, path, "dataset_id")
        boxes = {
            str(row["dataset_id"]): box_xywh_to_xyxy(row["bbox"], f"{path}: {row['dataset_id']!r}: a box")
            for row in rows
        }
    name = "TextVQA_0.5.1_val.json"
    for entry in source.each(source.json(name)["data"], name, "question_id"):
        record = {"id": str(official(entry, "question_id", ByName)), "question": entry["question"],
                  "labels": entry["answers"], "image_path": f"{official(entry, 'image_id', ByName)}.jpg",
                  "image_size": [entry["image_width"], entry["image_height"]]}  # fmt: skip
        yield record | ({"gt_bbox": boxes[record["id"]]} if record["id"] in boxes else {})


def docvqa(source: Source) -> Iterator[dict[str, Any]]:
    """DocVQA task 1, validation (`val_v1.0*.json`)."""
    for entry in source.each(source.json("val_v1.0*.json")["data"], "val_v1.0*.json", "questionId"):
        yield {
            "id": str(official(entry, "questionId", ByName)),
            "question": entry["question"],
            "labels": entry["answers"],
            "image_path": Path(entry["image"]).name,
        }  # fmt: skip (the folder's name differs between releases)


def gqa(source: Source) -> Iterator[dict[str, Any]]:
    """GQA, balanced test-dev questions."""
    for key, entry in source.json("testdev_balanced_questions.json").items():
        source.at = f"testdev_balanced_questions.json: {key!r}"
        yield {"id": key, "question": entry["question"], "labels": entry["answer"],
               "image_path": f"{official(entry, 'imageId', ByName)}.jpg"}  # fmt: skip


def aokvqa(source: Source) -> Iterator[dict[str, Any]]:
    """A-OKVQA 1.0, validation: direct answers, and the choices for the official multiple choice."""
    kept = ("choices", "correct_choice_idx", "difficult_direct_answer")
    for entry in source.each(source.json("aokvqa_v1p0_val.json"), "aokvqa_v1p0_val.json", "question_id"):
        record = {"id": entry["question_id"], "question": entry["question"], "labels": entry["direct_answers"],
                  "image_path": f"{official(entry, 'image_id', ByNumber):012}.jpg"}  # fmt: skip
        yield record | {name: entry[name] for name in kept if name in entry}


def pope(source: Source) -> Iterator[dict[str, Any]]:
    """POPE on COCO: its three files, each a category."""
    for split in ("random", "popular", "adversarial"):
        name = f"coco_pope_{split}.json"
        for entry in source.each(source.lines(name), name, "question_id"):
            key = official(entry, "question_id", ByName)
            yield {"id": f"{split}-{key}", "question": entry["text"], "labels": entry["label"],
                   "image_path": entry["image"], "category": split}  # fmt: skip


def vstar(source: Source) -> Iterator[dict[str, Any]]:
    """V*Bench: the question with its options as published; its map is made for the question without options.

    The label is the option's letter. gt_bbox encloses the targets of the annotation beside the image, if there is one.
    """
    for entry in source.each(source.lines("test_questions.jsonl"), "test_questions.jsonl", "question_id"):
        key = official(entry, "question_id", ByName)
        record = {"id": f"{entry['category']}-{key}", "question": entry["text"],
                  "labels": entry["label"], "image_path": entry["image"],
                  "short_question": entry["text"].split("\n")[0], "category": entry["category"]}  # fmt: skip
        annotation = source.image(str(Path(entry["image"]).with_suffix(".json")))
        if annotation:
            boxes = targets(annotation, source.image(entry["image"]), name_of(record))
            left, top, right, bottom = zip(*boxes, strict=True)
            record["gt_bbox"] = [min(left), min(top), max(right), max(bottom)]
        yield record


def targets(annotation: Path, image: Path | None, name: str) -> list[list[float]]:
    """The boxes (xyxy) of a V* annotation; each must lie in the image, if there is one.

    Raises:
        ValueError: beginning with `name`: there is no box, or one that does not lie in the image.
    """
    size, boxes = image and size_as_seen(image), []
    for box in read_json(annotation)["bbox"]:
        boxes.append(box_xywh_to_xyxy(box, f"{name}: {annotation}: a box"))
        refuse_misplaced(boxes[-1], size, f"{name}: {annotation}: box {shown(box)} (x, y, width, height)")
    if not boxes:
        raise ValueError(f"{name}: {annotation} has no box")
    return boxes


def vqav2(source: Source) -> Iterator[dict[str, Any]]:
    """VQAv2, validation: questions and annotations."""
    rows = source.json("v2_mscoco_val2014_annotations.json")["annotations"]
    refuse_bad_ids(rows, "v2_mscoco_val2014_annotations.json", "question_id")
    answers = {official(entry, "question_id", ByNumber): [answer["answer"] for answer in entry["answers"]]
               for entry in source.each(rows, "v2_mscoco_val2014_annotations.json", "question_id")}  # fmt: skip
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    for entry in source.each(source.json(name)["questions"], name, "question_id"):
        key = official(entry, "question_id", ByNumber)
        if key not in answers:
            raise ValueError(f"v2_mscoco_val2014_annotations.json has no answers to question {key}")
        yield {"id": str(key), "question": entry["question"], "labels": answers[key],
               "image_path": f"COCO_val2014_{official(entry, 'image_id', ByNumber):012}.jpg"}  # fmt: skip


CONVERTERS = {each.__name__: each for each in (textvqa, docvqa, gqa, aokvqa, pope, vstar, vqav2)}
KINDS = {"textvqa": Listed, "docvqa": Listed, "gqa": Single, "aokvqa": WithChoices, "pope": YesOrNo, "vstar": Letter,
         "vqav2": Listed}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- downloads
COCO = "http://images.cocodataset.org/zips"
VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/main/output/coco"
BOXES = "to have gt_bbox, save https://huggingface.co/datasets/jrzhang/TextVQA_GT_bbox as TextVQA_GT_bbox.json there"
# dataset -> its public files; archives among them are unpacked after the download.
DOWNLOADS = {
    "textvqa": ["https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
                "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"],
    "gqa": ["https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
            "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"],
    "aokvqa": ["https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz", f"{COCO}/val2017.zip"],
    "pope": [*(f"{POPE}/coco_pope_{split}.json" for split in ("random", "popular", "adversarial")),
             f"{COCO}/val2014.zip"],
    "vqav2": [f"{VQA}/v2_Questions_Val_mscoco.zip", f"{VQA}/v2_Annotations_Val_mscoco.zip", f"{COCO}/val2014.zip"],
}  # fmt: skip
HUB = {"vstar": "craigwu/vstar_bench"}  # datasets that are files on the Hugging Face hub
LICENSED = {"docvqa": "https://rrc.cvc.uab.es/?ch=17&com=downloads"}  # dataset -> the page to accept its licence on


def fetch(dataset: str, folder: str | Path) -> None:
    """Download all public files of a dataset into a folder.

    Raises:
        Unavailable: the licence must be accepted on a page first, or a file cannot be downloaded.
    """
    if dataset in LICENSED:
        page = LICENSED[dataset]
        raise Unavailable(f"{dataset} needs its licence accepted: register at {page}, download task 1 (annotations and "
                          "images), and run this again with --source")  # fmt: skip
    if dataset in HUB:
        from huggingface_hub import snapshot_download  # resumes, and checks what it has fetched

        snapshot_download(HUB[dataset], repo_type="dataset", local_dir=folder)
    paths = {url: Path(folder) / url.rsplit("/", 1)[1] for url in DOWNLOADS.get(dataset, ())}
    say_how_much(dataset, [url for url, path in paths.items() if not path.exists()], folder)
    for url, path in paths.items():
        unpack(download(url, path))
    if dataset == "textvqa":
        print(BOXES.replace("there", f"in {folder}"))


def say_how_much(dataset: str, urls: Sequence[str], folder: str | Path) -> None:
    """Print how many bytes the files have that are to be downloaded; the bars then say how long that takes."""
    sizes = [size_of(url) for url in urls]
    known_ones, rest = [size for size in sizes if size is not None], sizes.count(None)
    if sizes:
        more = f" and {rest} of unknown size" if rest else ""
        print(
            f"{dataset}: {len(sizes)} files to download into {folder}: {gigabytes(sum(known_ones))}{more}", flush=True
        )


def unpack(path: Path) -> None:
    """Unpack an archive, once, into the folder that it lies in; members outside of that folder are refused."""
    done = path.with_name(path.name + ".unpacked")
    if done.exists() or not path.name.endswith((".zip", ".tar.gz")):
        return
    try:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:  # checks each member's CRC, and keeps all within the folder
                archive.extractall(path.parent)
        else:
            with gzip.open(path) as stream:  # to its end, where the CRC is: tarfile does not read that far
                while stream.read(CHUNK):
                    pass
            with tarfile.open(path) as archive:
                archive.extractall(path.parent, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise Unavailable(f"{path} was broken ({error}) and is removed: the same command fetches it again") from error
    done.touch()


# ------------------------------------------------------------------------------------------------------------- writing
def prepare(
    dataset: str, source: str | Path, target: str | Path, sample: int | None = None, seed: int = 0, copy: bool = False
) -> list[dict]:
    """Convert a release, check its images, and write `target`/data.json and `target`/images. Returns the records.

    Args:
        sample: the number of records to draw with `seed`; None keeps all.
        copy: copy images; else they are hard-linked if the file system allows it.
    """
    release = Source(source)
    try:
        records = list(CONVERTERS[dataset](release))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{release.at or release.folder}: an entry of {dataset} is not as in its official files, or has no {error} "
            f"({type(error).__name__})"
        ) from error
    if not records:
        raise ValueError(f"{release.folder} has no questions of {dataset}")
    refuse_bad_ids(records, release.folder)
    for record in records:
        checked(record, KINDS[dataset], name_of(record))
    if sample is not None:
        if not 0 < sample <= len(records):
            raise ValueError(f"--sample must be from 1 to {len(records)}, the records of {dataset}, not {sample}")
        chosen = set(random.Random(seed).sample(range(len(records)), sample))
        records = [record for number, record in enumerate(records) if number in chosen]
    for record in records:
        if Path(record["image_path"]).is_absolute() or ".." in Path(record["image_path"]).parts:
            raise ValueError(
                f"record {record['id']!r}: its image {record['image_path']!r} would leave the image folder"
            )
    found = {record["image_path"]: release.image(record["image_path"]) for record in records}
    images = {name: path for name, path in found.items() if path is not None}
    missing = [name for name in found if name not in images]
    if missing:
        named, names = ", ".join(missing[:5]), {Path(name).name for name in missing}
        packed = release.packed(lambda member: member.name in names)
        raise ValueError(
            f"{len(missing)} of {len(found)} images of {dataset} are not in {release.folder}: {named}{packed}"
        )
    refuse_what_images_contradict(records, images)
    print(
        f"{dataset}: {len(records)} questions, {len(images)} images to {'copy' if copy else 'link or copy'}", flush=True
    )
    for name, path in tqdm(images.items(), desc="images", unit="image"):
        place(path, Path(target) / "images" / name, copy)
    write_atomically(Path(target) / "data.json", records)
    return load_task(Path(target) / "data.json")


def refuse_what_images_contradict(records: Sequence[dict], images: Mapping[str, Path]) -> None:
    """ValueError, naming the record, if its image_size or gt_bbox does not fit its image; reads only the header.

    Args:
        images: {image_path: file}.
    """
    about = [record for record in records if "gt_bbox" in record or "image_size" in record]
    sizes = {name: size_as_seen(images[name]) for name in {record["image_path"] for record in about}}
    for record in about:
        refuse_other_size(record, sizes[record["image_path"]])
        if "gt_bbox" in record:
            box_of(record, image_size=sizes[record["image_path"]])


def place(path: Path, target: Path, copy: bool) -> None:
    """Link or copy a file to `target`, unless the same file is there already."""
    if target.exists() and (os.path.samefile(path, target) or filecmp.cmp(path, target, shallow=False)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not copy:
        try:
            os.link(path.resolve(), target)  # resolved: the path may be a relative symbolic link
            return
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(path, target)


def describe(records: Sequence[dict]) -> str:
    """The numbers of questions, images, categories and boxes, in one line."""
    counts = [f"{len(records)} questions about {len({record['image_path'] for record in records})} images"]
    counts += [
        f"{number} {name}" for name, number in Counter(r["category"] for r in records if "category" in r).items()
    ]
    boxes = sum("gt_bbox" in record for record in records)
    return ", ".join(counts + ([f"{boxes} with gt_bbox"] if boxes else []))


def main(argv: Sequence[str] | None = None, prog: str = "prepare_data") -> None:
    """The command; `prog` is its name in messages."""
    parser = CommandParser(prog, __doc__)
    add = parser.add_argument
    add("dataset", choices=CONVERTERS)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--source", help="folder with the official files, at any depth (this or --download is required)")
    where.add_argument(
        "--download", action="store_true", help="fetch them into data/<dataset>/source (this or --source is required)"
    )
    add("--target", help="folder to write to; default: data/<dataset>")
    add("--sample", type=int, help="number of questions to draw at random; default: all")
    add("--seed", type=int, default=0, help="seed of the sample")
    add("--copy", action="store_true", help="copy images instead of linking them")
    args = parser.parse_args(argv)
    target = Path(args.target) if args.target else in_repository(TASKS[args.dataset]["question_path"]).parent
    try:
        if args.download:
            args.source = target / "source"
            args.source.mkdir(parents=True, exist_ok=True)
            fetch(args.dataset, args.source)
        records = prepare(args.dataset, args.source, target, args.sample, args.seed, args.copy)
    except (ValueError, OSError, Unavailable) as error:
        sys.exit(f"{prog}: {error}")
    print(f"{target / 'data.json'}: {describe(records)}")


if __name__ == "__main__":
    main()
