"""Makes data/<dataset>/ of a benchmark's official files: questions in the toolkit's format, and the images.

    vicrop prepare textvqa --source DIR                      # the files of the official release, anywhere below DIR
    vicrop prepare pope --download                           # fetch the public files first, into data/<dataset>/source
    vicrop prepare vqav2 --source DIR --sample 5000 --seed 0

Nothing is written before all images have been found.
"""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vicrop.command_line import CommandParser, gigabytes
from vicrop.dataset import GROUNDING, box_of, checked, load_task, name_of, refuse_bad_ids, refuse_other_size
from vicrop.files import in_repository, write_atomically
from vicrop.images import size_as_seen
from vicrop.localization.refcoco import write_lines
from vicrop.prepare import documents, high_resolution, papers, referring
from vicrop.prepare.download import CHUNK, Unavailable, download, size_of
from vicrop.prepare.kinds import Letter, Listed, Phrase, Single, WithChoices, WithOptions, YesOrNo
from vicrop.prepare.source import Source
from vicrop.tables import TASKS

# dataset -> (its converter, what its records must be)
RELEASES = {
    "textvqa": (papers.textvqa, Listed), "docvqa": (papers.docvqa, Listed), "gqa": (papers.gqa, Single),
    "aokvqa": (papers.aokvqa, WithChoices), "pope": (papers.pope, YesOrNo), "vstar": (papers.vstar, Letter),
    "vqav2": (papers.vqav2, Listed),
    "hrbench_4k": (high_resolution.hrbench_4k, WithOptions), "hrbench_8k": (high_resolution.hrbench_8k, WithOptions),
    "mme_realworld": (high_resolution.mme_realworld, WithOptions),
    "mme_realworld_lite": (high_resolution.mme_realworld_lite, WithOptions),
    "infovqa": (documents.infovqa, Listed), "chartqa": (documents.chartqa, Single),
    "refcoco": (referring.refcoco, Phrase), "refcoco_plus": (referring.refcoco_plus, Phrase),
    "refcocog": (referring.refcocog, Phrase),
}  # fmt: skip
CONVERTERS = {name: converter for name, (converter, _) in RELEASES.items()}


# ----------------------------------------------------------------------------------------------------------- downloads
COCO = "http://images.cocodataset.org/zips"
VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/main/output/coco"
TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
MDETR = "https://zenodo.org/record/4729015/files/mdetr_annotations.tar.gz"  # with boxes, without masks
BOXES = "to have gt_bbox, save https://huggingface.co/datasets/jrzhang/TextVQA_GT_bbox as TextVQA_GT_bbox.json there"
# dataset -> its public files; archives among them are unpacked after the download.
DOWNLOADS = {
    "textvqa": [f"{TEXTVQA}/data/TextVQA_0.5.1_val.json", f"{TEXTVQA}/data/TextVQA_Rosetta_OCR_v0.2_val.json",
                f"{TEXTVQA}/images/train_val_images.zip"],
    "gqa": ["https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
            "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"],
    "aokvqa": ["https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz", f"{COCO}/val2017.zip"],
    "pope": [*(f"{POPE}/coco_pope_{split}.json" for split in ("random", "popular", "adversarial")),
             f"{COCO}/val2014.zip"],
    "vqav2": [f"{VQA}/v2_Questions_Val_mscoco.zip", f"{VQA}/v2_Annotations_Val_mscoco.zip", f"{COCO}/val2014.zip"],
    "chartqa": ["https://github.com/vis-nlp/ChartQA/archive/refs/heads/main.zip"],
    **{name: [MDETR, f"{COCO}/train2014.zip"] for name in ("refcoco", "refcoco_plus", "refcocog")},
}  # fmt: skip
# dataset -> a dataset of the Hugging Face hub, and which of its files are wanted (all without a pattern)
HUB = {
    "vstar": ("craigwu/vstar_bench", None),
    "hrbench_4k": ("DreamMr/HR-Bench", "hr_bench_4k.tsv"), "hrbench_8k": ("DreamMr/HR-Bench", "hr_bench_8k.tsv"),
    "mme_realworld": ("yifanzhang114/MME-RealWorld-Lmms-eval", "*.parquet"),
    "mme_realworld_lite": ("yifanzhang114/MME-RealWorld-Base64", "mme_realworld_lite.tsv"),
}  # fmt: skip
RRC = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
# dataset -> the page to accept its licence on, and what to fetch there
LICENSED = {"docvqa": (RRC, "task 1 (annotations and images)"), "infovqa": (RRC, "task 3 (annotations and images)")}


def fetch(dataset: str, folder: str | Path) -> None:
    """Download all public files of a dataset into a folder.

    Raises:
        Unavailable: the licence must be accepted on a page first, or a file cannot be downloaded.
    """
    if dataset in LICENSED:
        page, what = LICENSED[dataset]
        raise Unavailable(f"{dataset} needs its licence accepted: register at {page}, download {what}, and run this "
                          "again with --source")  # fmt: skip
    if dataset in HUB:
        from huggingface_hub import snapshot_download  # resumes, and checks what it has fetched

        name, pattern = HUB[dataset]
        say_how_much_of_hub(dataset, name, pattern, folder)
        snapshot_download(name, repo_type="dataset", local_dir=folder, allow_patterns=pattern)
    paths = {url: Path(folder) / url.rsplit("/", 1)[1] for url in DOWNLOADS.get(dataset, ())}
    say_how_much(dataset, [url for url, path in paths.items() if not path.exists()], folder)
    for url, path in paths.items():
        unpack(download(url, path))
    if dataset == "textvqa":
        print(BOXES.replace("there", f"in {folder}"))


def say_how_much(dataset: str, urls: Sequence[str], folder: str | Path) -> None:
    """Print how many bytes the files have that are to be downloaded; the bars then say how long that takes."""
    say_sizes(dataset, [size_of(url) for url in urls], folder)


def say_how_much_of_hub(dataset: str, name: str, pattern: str | None, folder: str | Path) -> None:
    """As `say_how_much`, of those files of a dataset on the hub that match a pattern and are not there yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    files = HfApi().dataset_info(name, files_metadata=True).siblings or []
    files = filter_repo_objects(files, allow_patterns=pattern, key=lambda file: file.rfilename)
    say_sizes(dataset, [file.size for file in files if not (Path(folder) / file.rfilename).exists()], folder)


def say_sizes(dataset: str, sizes: Sequence[int | None], folder: str | Path) -> None:
    """Print how many files of these sizes are to be downloaded (None: it is not known), and how many bytes."""
    if sizes:
        unknown = sizes.count(None)
        more = f" and {unknown} of unknown size" if unknown else ""
        total = gigabytes(sum(size or 0 for size in sizes))
        print(f"{dataset}: {len(sizes)} files to download into {folder}: {total}{more}", flush=True)


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
        sample: the number of records to draw with `seed` (see `drawn`); None keeps all.
        copy: copy images; else they are hard-linked if the file system allows it.
    """
    target = Path(target)
    with Source(source, target.absolute().with_name(f".{target.name}.images")) as release:
        records = records_of(release, dataset)
        if sample is not None:
            if not 0 < sample <= len(records):
                raise ValueError(f"--sample must be from 1 to {len(records)}, the records of {dataset}, not {sample}")
            records = drawn(records, sample, seed)
        images = images_of(release, dataset, records)
        refuse_what_images_contradict(records, images)
        how = "copy" if copy else "link or copy"
        print(f"{dataset}: {len(records)} questions, {len(images)} images to {how}", flush=True)
        for name, path in tqdm(images.items(), desc="images", unit="image"):
            place(path, target / "images" / name, copy)
    phrases = [grounding_line(record) for record in records if "prompt" in record]
    if phrases:
        write_lines(target / GROUNDING, phrases)
    write_atomically(target / "data.json", records)
    return load_task(target / "data.json")


def drawn(records: Sequence[dict], sample: int, seed: int) -> list[dict]:
    """So many of the records, in their order.

    Where a question is asked several times, with its options in other orders (`cycle`), all of them are drawn together:
    then there may be a few more.
    """
    asked: dict[Any, list[int]] = {}
    for number, record in enumerate(records):
        key = (record["image_path"], record["short_question"]) if "cycle" in record else number
        asked.setdefault(key, []).append(number)
    groups, chosen = list(asked.values()), set()
    for group in random.Random(seed).sample(groups, min(sample, len(groups))):
        if len(chosen) < sample:
            chosen.update(group)
    return [record for number, record in enumerate(records) if number in chosen]


def records_of(release: Source, dataset: str) -> list[dict]:
    """The records of a release, each as it must be.

    Raises:
        ValueError: naming the file and the entry, or the record.
    """
    converter, kind = RELEASES[dataset]
    try:
        records = list(converter(release))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{release.at or release.folder}: an entry of {dataset} is not as in its official files, or has no {error} "
            f"({type(error).__name__})"
        ) from error
    if not records:
        raise ValueError(f"{release.folder} has no questions of {dataset}")
    refuse_bad_ids(records, release.folder)
    for record in records:
        checked(record, kind, name_of(record))
    return records


def images_of(release: Source, dataset: str, records: Sequence[dict]) -> dict[str, Path]:
    """{image_path: file} of some records; a ValueError names what would leave the folder, or is missing."""
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
    return images


def grounding_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line about a record with a phrase: as `localization.pipeline stage=batch` and the evaluations read it."""
    (x1, y1, x2, y2), (width, height) = record["gt_bbox"], record["image_size"]
    line = {"id": record["id"], "prompt": record["prompt"], "image_path": f"images/{record['image_path']}",
            "bbox": [x1, y1, round(x2 - x1, 4), round(y2 - y1, 4)], "width": width, "height": height}  # fmt: skip
    return line | ({"segmentation": record["segmentation"]} if "segmentation" in record else {})


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
    categories = [record["category"] for record in records if isinstance(record.get("category"), str)]
    counts += [f"{number} {name}" for name, number in Counter(categories).items()]
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
