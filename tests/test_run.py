"""The commands, on a random-weight checkpoint saved to disk: nothing lost, every method runs, errors are sentences."""

import csv
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from builders import build_llava, photo
from PIL import Image

from vicrop import load_model, prefix_cache, vicrop_qa
from vicrop.boxes import bbox_in_region
from vicrop.evaluation import columns, runner
from vicrop.evaluation import command as run
from vicrop.evaluation import score_table as get_score
from vicrop.evaluation.metrics import GRADERS
from vicrop.evaluation.scores import ScoreOptions
from vicrop.images import load_image
from vicrop.map_files import read_maps
from vicrop.models.llava import PROMPT, LlavaAdapter, rel_att
from vicrop.session import ImageSession
from vicrop.tables import GENERAL_PROMPT, METHODS, MODELS, TASKS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a small LLaVA whose default layer is its own, as the embedded models' is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = build_llava(center_crop=True)
    model.config.att_layer = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def dataset(tmp_path):
    """Three questions about two images, one of them larger than a tile."""
    images = tmp_path / "images"
    images.mkdir()
    photo(120, 90).save(images / "a.png")
    photo(1100, 600, seed=1).save(images / "b.png")
    records = [
        {"id": "1", "question": "one?", "labels": ["1"], "image_path": "a.png", "gt_bbox": [9, 9, 30, 30], "size": "s"},
        {"id": "2", "question": "two?", "labels": "2", "image_path": "b.png", "gt_bbox": [500, 9, 530, 30]},
        {"id": "3", "question": "three?", "labels": ["3"], "image_path": "a.png", "gt_bbox": [0, 0, 9, 9]},
    ]  # fmt: skip
    records[1]["size"], records[2]["short_question"] = "l", "3?"
    return write(tmp_path, records)


def write(folder, records):
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def options(checkpoint, dataset, *more):
    where = [
        "--question_path",
        dataset / "data.json",
        "--image_path",
        dataset / "images",
        "--save_path",
        dataset / "out",
    ]
    common = ["--model", "llava", "--model_id", checkpoint, "--task", "demo", "--device", "cpu"]
    return [str(option) for option in [*common, *where, *more]]


def results(dataset, method):
    return json.loads((dataset / "out" / f"llava-demo-{method}.json").read_text())


def alike(found, wanted):
    """Records are equal but for the last digits of probabilities, which depend on what was read together."""
    assert [{**each, "confidence": None} for each in found] == [{**each, "confidence": None} for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.get("confidence") == pytest.approx(other.get("confidence"), rel=1e-3)


def test_every_method_writes_its_file_and_the_score_lists_it(checkpoint, dataset, croppers, capsys):
    run.main(options(checkpoint, dataset, "--method", ",".join(METHODS), *croppers))
    records = json.loads((dataset / "data.json").read_text())
    maps = {}
    for method in METHODS:
        found = results(dataset, method)
        assert [r["id"] for r in found] == ["1", "2", "3"]
        for record, result in zip(records, found, strict=True):
            assert result.items() >= record.items()
            added = {"views"} if method.endswith(("_high", "_zoom")) else set()
            assert result.keys() - record.keys() == {"original_answer", "crop_answer", "bbox", "confidence"} | added
            width, height = load_image(dataset / "images" / record["image_path"]).size
            x1, y1, x2, y2 = result["bbox"]
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        maps[method] = [result["bbox"] for result in found]
        assert [r["original_answer"] for r in found] == [r["original_answer"] for r in results(dataset, "rel_att")]
    assert len({str(boxes) for boxes in maps.values()}) > 6  # the methods do differ
    capsys.readouterr()
    rows = get_score.report(dataset / "out", dataset, ScoreOptions())
    columns.show(rows)
    table = capsys.readouterr().out
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["part"] for row in rows} == {"all", "s", "l", "medium"}  # the third's size is that of its box
    assert all(method in table for method in METHODS)
    assert json.loads((dataset / "evaluation_report.json").read_text()) == rows
    with (dataset / "evaluation_report.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_list_of_methods_gives_what_each_gives_alone(checkpoint, dataset):
    run.main(options(checkpoint, dataset, "--method", "rel_att,grad_att,pure_grad"))
    together = {method: results(dataset, method) for method in ("rel_att", "grad_att", "pure_grad")}
    for method, found in together.items():
        run.main(options(checkpoint, dataset, "--method", method, "--overwrite"))
        alike(results(dataset, method), found)


def test_vicrop_qa_is_what_the_command_writes(checkpoint, dataset):
    run.main(options(checkpoint, dataset, "--method", "rel_att_high,grad_att"))
    model, processor = load_model("llava", checkpoint, "cpu")
    for method in ("rel_att_high", "grad_att"):
        for result in results(dataset, method):
            picture = dataset / "images" / result["image_path"]
            question = (picture, result["question"], model, processor, result.get("short_question"))
            original, crop, bbox = vicrop_qa("llava", method, *question)
            assert [original, crop, list(bbox)] == [result["original_answer"], result["crop_answer"], result["bbox"]]


def test_an_interrupted_run_goes_on_and_answers_nothing_twice(checkpoint, dataset, monkeypatch):
    asked, answer = [], runner.answer_batch

    def interrupted(batch, *rest):
        if len(asked) == 1:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.extend(record["question"] for record in batch)
        return answer(batch, *rest)

    monkeypatch.setattr(runner, "answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(options(checkpoint, dataset))
    assert not (dataset / "out" / "llava-demo-rel_att.json").exists()
    run.main(options(checkpoint, dataset))
    run.main(options(checkpoint, dataset))
    assert sorted(asked) == ["one?", "stop", "three?", "two?"]
    assert len(results(dataset, "rel_att")) == 3


def test_a_device_map_gives_the_same_file(checkpoint, dataset):
    run.main(options(checkpoint, dataset))
    found = results(dataset, "rel_att")
    run.main(options(checkpoint, dataset, "--device_map", "auto", "--overwrite"))
    alike(results(dataset, "rel_att"), found)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_batches_make_the_same_file(checkpoint, dataset, size):
    methods = ("rel_att", "grad_att", "pure_grad", "rel_att_high", "center_crop")
    run.main(options(checkpoint, dataset, "--method", ",".join(methods)))
    one_by_one = {method: results(dataset, method) for method in methods}
    run.main(options(checkpoint, dataset, "--method", ",".join(methods), "--batch_size", str(size), "--overwrite"))
    for method in methods:
        alike(results(dataset, method), one_by_one[method])


def test_one_bad_image_in_a_batch_is_its_own_error(checkpoint, dataset):
    run.main(options(checkpoint, dataset))
    fine = results(dataset, "rel_att")
    (dataset / "images" / fine[0]["image_path"]).write_text("no image")
    run.main(options(checkpoint, dataset, "--batch_size", "3", "--overwrite"))
    for before, after in zip(fine, results(dataset, "rel_att"), strict=True):
        broken = before["image_path"] == fine[0]["image_path"]
        assert ("error" in after) == broken
        assert after["crop_answer"] == ("" if broken else before["crop_answer"])


def test_chunks_make_the_same_file(checkpoint, dataset):
    run.main(options(checkpoint, dataset))
    whole = results(dataset, "rel_att")
    (dataset / "out" / "llava-demo-rel_att.json").unlink()
    for chunk in ("1", "0"):
        run.main(options(checkpoint, dataset, "--total_chunks", "2", "--chunk_id", chunk))
    alike(results(dataset, "rel_att"), whole)


@pytest.mark.parametrize("parts", [["--total_chunks", "2", "--chunk_id"], ["--limit"]], ids=["chunks", "limits"])
def test_saved_maps_are_those_of_the_method_whatever_the_order_of_work(checkpoint, dataset, parts):
    methods = ("rel_att", "rel_att_high", "center_crop")
    common = options(checkpoint, dataset, "--method", ",".join(methods), "--save_maps")
    for part in ("1", "0") if "--chunk_id" in parts else ("1", "3"):
        run.main([*common, *parts, part])
    assert [path.name for path in sorted((dataset / "out").glob("*.npz"))] == [
        f"llava-demo-{method}.maps.npz" for method in methods[:2]
    ]
    model, processor = load_model("llava", checkpoint, device="cpu")
    for method, wanted in (("rel_att", rel_att), ("rel_att_high", rel_att.high_res)):
        maps = read_maps(dataset / "out" / f"llava-demo-{method}.maps.npz")
        assert list(maps) == ["1", "2", "3"]
        for record in results(dataset, method):
            image = load_image(dataset / "images" / record["image_path"])
            questions = (record.get("short_question") or record["question"], GENERAL_PROMPT)
            prompts = (PROMPT.format(question=question) for question in questions)
            att_map, (found, region) = wanted(image, *prompts, model, processor), maps[record["id"]]
            assert np.abs(found - att_map).max() <= 1e-3 * att_map.max()
            assert list(bbox_in_region(att_map, region, image.size, 56)) == record["bbox"]
        assert not any("map" in field for record in results(dataset, method) for field in record)
    (dataset / "out" / "llava-demo-rel_att.json").unlink()  # with other settings nothing of the old maps may stay
    without = [option for option in common if option != "--save_maps"]
    run.main([*without, "--method", "rel_att", "--layer", "1"])
    assert not list((dataset / "out").glob("llava-demo-rel_att.maps.npz"))
    run.main([*without, "--method", "rel_att_high", "--overwrite"])
    assert not list((dataset / "out").glob("*.npz"))


def test_a_bad_record_is_kept_with_its_error_and_stops_nothing(checkpoint, dataset, capsys):
    records = json.loads((dataset / "data.json").read_text())
    records[1]["image_path"] = "gone.png"
    (dataset / "images" / "text.png").write_text("no image")
    records.append({"id": "4", "question": "four?", "labels": ["4"], "image_path": "text.png"})
    records.append({"id": "5", "question": "", "labels": ["5"], "image_path": "a.png"})
    write(dataset, records)
    run.main(options(checkpoint, dataset))
    found = results(dataset, "rel_att")
    assert [("error" in record) for record in found] == [False, True, False, True, True]
    assert [record["crop_answer"] for record in found if "error" in record] == [""] * 3
    printed = capsys.readouterr().err
    assert "3 records" in printed
    assert "gone.png" in printed
    rows = get_score.report(dataset / "out", dataset, ScoreOptions())
    assert rows[0]["errors"] == 3
    assert "5: record '5' has no question" in printed
    photo().save(dataset / "images" / "gone.png")
    photo().save(dataset / "images" / "text.png")
    run.main(options(checkpoint, dataset))
    assert results(dataset, "rel_att") == found  # what ended in an error is done, unless told otherwise
    run.main(options(checkpoint, dataset, "--retry_errors"))
    assert [("error" in record) for record in results(dataset, "rel_att")] == [False] * 4 + [True]


def test_a_run_that_answers_nothing_fails(checkpoint, dataset):
    for image in (dataset / "images").iterdir():
        image.write_text("no image")
    with pytest.raises(SystemExit, match="no record could be answered"):
        run.main(options(checkpoint, dataset))
    assert ["error" in record for record in results(dataset, "rel_att")] == [True] * 3


def test_a_decompression_bomb_is_refused(checkpoint, dataset, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 120 * 90 + 1)  # so that one of the two images is one
    run.main(options(checkpoint, dataset))
    errors = [record.get("error", "") for record in results(dataset, "rel_att")]
    assert [bool(error) for error in errors] == [False, True, False]
    assert "b.png is refused" in errors[1]


TOO_LITTLE = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
TOO_LITTLE += [MemoryError("Unable to allocate memory")]


@pytest.mark.parametrize("error", TOO_LITTLE, ids=["gpu", "cpu", "numpy"])
def test_out_of_memory_costs_a_batch_nothing_and_a_single_record_itself(checkpoint, dataset, monkeypatch, error):
    run.main(options(checkpoint, dataset))
    fine, answer = results(dataset, "rel_att"), ImageSession.answers

    def crowded(session, prompts, **more):
        if len(prompts) > 1 or session.images[0].width > 1000:
            raise error
        return answer(session, prompts, **more)

    monkeypatch.setattr(ImageSession, "answers", crowded)
    run.main(options(checkpoint, dataset, "--batch_size", "3", "--overwrite"))
    found = results(dataset, "rel_att")
    alike(found[0::2], fine[0::2])
    assert "memory" in found[1]["error"]
    assert (found[1]["original_answer"], found[1]["crop_answer"], found[1]["bbox"]) == ("", "", None)


def test_an_error_in_the_code_is_not_taken_for_a_bad_record(checkpoint, dataset, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ImageSession, "answers", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        run.main(options(checkpoint, dataset))


@pytest.mark.parametrize("box", ["left", [1, 2, 3], [5, 5, 1, 9], [0, 0, float("nan"), 5], [1e308, 0, 1.7e308, 9]])
def test_a_box_that_is_none_is_an_error_of_its_record(checkpoint, dataset, box):
    records = json.loads((dataset / "data.json").read_text())
    records[0]["gt_bbox"] = box
    write(dataset, records)
    run.main(options(checkpoint, dataset, "--method", "gt_crop"))
    found = results(dataset, "gt_crop")
    assert ["error" in record for record in found] == [True, False, False]
    assert "'1'" in found[0]["error"]


def test_the_meta_file_tells_how_a_result_was_made(checkpoint, dataset):
    run.main(options(checkpoint, dataset, "--method", "rel_att,center_crop", "--layer", "mean"))
    for method, layers in (("rel_att", [0, 1, 2, 3]), ("center_crop", [])):
        meta = json.loads((dataset / "out" / f"llava-demo-{method}.meta.json").read_text())
        assert meta["settings"].items() >= {"method": method, "dtype": "float32"}.items()
        assert meta["settings"].get("layer") == ("mean" if layers else None)  # of what reads one
        assert "{question}" in meta["settings"]["prompt"]
        assert len(meta["settings"]["data_sha256"]) == 64
        assert meta["counts"] == {"records": 3, "errors": 0, "dataset": 3}
        (made,) = meta["runs"].values()
        assert made["layers"] == layers
        assert made["versions"].keys() >= {"python", "torch", "transformers"}
        assert made["methods"] == ["rel_att", "center_crop"]
        assert meta["forwards"] == made["forwards"] >= 3 * 2
        assert made["prefix_shared"] is True
        assert "batched" not in made  # one question at a time
        assert meta["seconds"] == made["seconds"] > 0


def test_localization_heads_are_settings_of_loc_att_alone(checkpoint, dataset):
    (dataset / "heads.json").write_text(json.dumps({"heads": "L2H1,L3H0", "model": "llava"}))
    for heads, layers in (("L2H1,L3H0", [2, 3]), (dataset / "heads.json", [2, 3]), ("per_sample", [0, 1, 2, 3])):
        run.main(options(checkpoint, dataset, "--method", "loc_att,rel_att", "--loc_heads", str(heads), "--overwrite"))
        meta = json.loads((dataset / "out" / "llava-demo-loc_att.meta.json").read_text())
        assert meta["settings"]["loc_heads"] == ("per_sample" if len(layers) == 4 else "L2H1,L3H0")
        (made,) = meta["runs"].values()
        assert made["layers"] == layers
        assert not any("error" in record for record in results(dataset, "loc_att"))
    assert "loc_heads" not in json.loads((dataset / "out" / "llava-demo-rel_att.meta.json").read_text())["settings"]
    (dataset / "heads.json").write_text(json.dumps({"heads": "L2H1,L3H0", "model": "other"}))
    with pytest.warns(UserWarning, match="has the heads of other"):
        run.parse(options(checkpoint, dataset, "--method", "loc_att", "--loc_heads", str(dataset / "heads.json")))
    with pytest.raises(SystemExit, match="loc_heads was 'per_sample' and is now 'L2H1'"):
        run.main(options(checkpoint, dataset, "--method", "loc_att", "--loc_heads", "L2H1"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--layer", "1"], "layer was None and is now 1"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is now 'bfloat16'"),
        (["--geometry", "upstream"], "geometry was 'exact' and is now 'upstream'"),
        (["--model_id", "vicrop/embedded/llava"], "model_id was"),
    ],
)
def test_a_rerun_with_other_settings_refuses_to_mix_and_names_them(checkpoint, dataset, more, says):
    run.main(options(checkpoint, dataset, "--limit", "1"))
    with pytest.raises(SystemExit, match=says):
        run.main(options(checkpoint, dataset, *more))
    run.main(options(checkpoint, dataset, "--batch_size", "2"))  # what does not change an answer may change
    assert len(results(dataset, "rel_att")) == 3


def test_a_rerun_with_other_data_refuses_to_mix(checkpoint, dataset):
    run.main(options(checkpoint, dataset))
    (dataset / "data.json").write_text((dataset / "data.json").read_text() + "\n")
    with pytest.raises(SystemExit, match="data_sha256 was"):
        run.main(options(checkpoint, dataset))


def test_records_without_labels_are_answered(checkpoint, dataset):
    """There is nothing to score them by, which is for the score table to say; a run goes on, and so does its rerun."""
    records = json.loads((dataset / "data.json").read_text())
    for record, labels in zip(records, ([], None, ""), strict=True):
        record["labels"] = labels
    write(dataset, records)
    run.main(options(checkpoint, dataset, "--limit", "2"))
    run.main(options(checkpoint, dataset))
    assert not any("error" in record for record in results(dataset, "rel_att"))


@pytest.mark.parametrize("labels", [7, True, ["a", 7], [None], {"a": 1}, [["a"]]])
def test_labels_of_a_wrong_type_are_an_error_of_their_record_before_it_is_asked(
    checkpoint, dataset, monkeypatch, labels
):
    records = json.loads((dataset / "data.json").read_text())
    records[1]["labels"] = labels
    write(dataset, records)
    asked, answer = [], ImageSession.answers
    monkeypatch.setattr(
        ImageSession, "answers", lambda self, *a, **b: asked.append(self.images[0].size) or answer(self, *a, **b)
    )
    run.main(options(checkpoint, dataset, "--method", "center_crop"))
    errors = [record.get("error") for record in results(dataset, "center_crop")]
    assert errors == [None, f"record '2': labels are a text or a list of texts, not {labels!r}", None]
    assert set(asked) == {(120, 90)}


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ([90, 120], r"image_size [90, 120] is not that of its image, which is [120, 90] as it is seen (a camera's"),
        ([121, 90], "image_size [121, 90] is not that of its image, which is [120, 90] as it is seen"),
        ([120], "image_size is [width, height] in pixels, not [120]"),
        ("120x90", "image_size is [width, height] in pixels, not '120x90'"),
        ([0, 90], "image_size is [width, height] in pixels, not [0, 90]"),
    ],
)
def test_an_image_size_that_is_not_the_images_is_an_error_of_its_record_in_every_method(
    checkpoint, dataset, size, says
):
    records = json.loads((dataset / "data.json").read_text())
    records[0]["image_size"], records[1]["image_size"] = size, [1100, 600]
    write(dataset, records)
    methods = ["rel_att", "gt_crop", "center_crop"]
    run.main(options(checkpoint, dataset, "--method", ",".join(methods), "--batch_size", "3"))
    for method in methods:
        errors = [record.get("error") for record in results(dataset, method)]
        assert errors[0].startswith(f"record '1': {says}")
        assert errors[1:] == [None, None]


@pytest.mark.parametrize(
    "box", [[100, 9, 130, 30], [-3, 0, 20, 20], [9, 9, 30, 92], [0.1, 0.2, 0.3, 0.4], [500, 500, 900, 900]]
)
def test_a_box_outside_of_its_image_is_an_error_of_its_record(checkpoint, dataset, box):
    records = json.loads((dataset / "data.json").read_text())
    records[0]["gt_bbox"], records[2]["gt_bbox"] = box, [-0.5, 0, 121, 90.9]  # the last is only rounded
    write(dataset, records)
    run.main(options(checkpoint, dataset, "--method", "gt_crop"))
    errors = [record.get("error") for record in results(dataset, "gt_crop")]
    assert errors[1:] == [None, None]
    assert errors[0].startswith("record '1': gt_bbox [")


def test_a_large_picture_is_answered_once_it_is_allowed(checkpoint, dataset, monkeypatch, capsys):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 120 * 90 + 1)
    run.main(options(checkpoint, dataset))
    (error,) = [record["error"] for record in results(dataset, "rel_att") if "error" in record]
    assert all(part in error for part in ("b.png is refused: it has 660000 pixels", "--max_image_pixels"))
    capsys.readouterr()
    get_score.report(dataset / "out", dataset, ScoreOptions())
    assert "pixels" not in capsys.readouterr().err
    run.main(options(checkpoint, dataset, "--retry_errors", "--max_image_pixels", "660000"))
    assert not any("error" in record for record in results(dataset, "rel_att"))
    ask = ["--image", str(dataset / "images" / "b.png"), "--question", "what?", "--save_path", str(dataset)]
    common = ["--model", "llava", "--model_id", str(checkpoint), "--device", "cpu"]
    with pytest.raises(SystemExit, match="b.png is refused"):
        run.main([*common, *ask, "--max_image_pixels", "659999"])
    run.main([*common, *ask, "--max_image_pixels", "178956970"])


def test_a_rerun_with_other_weights_refuses_to_mix(checkpoint, dataset, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    run.main(options(copy, dataset, "--limit", "1"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit, match="weights was"):
        run.main(options(copy, dataset))


def test_a_rerun_with_another_layer_of_the_checkpoint_refuses_to_mix(checkpoint, dataset, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    run.main(options(copy, dataset, "--limit", "1"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"att_layer": 1}))
    with pytest.raises(SystemExit, match="weights was"):
        run.main(options(copy, dataset))


def test_what_is_the_same_may_go_on(checkpoint, dataset, monkeypatch):
    run.main(options(checkpoint, dataset, "--method", "rel_att,center_crop", "--layer", "1", "--limit", "1"))
    monkeypatch.chdir(checkpoint.parent)
    run.main(options(checkpoint.name, dataset, "--method", "center_crop"))  # reads no layer; the same folder
    assert len(results(dataset, "center_crop")) == 3


def test_nothing_is_added_to_a_result_of_which_nothing_is_known(checkpoint, dataset):
    run.main(options(checkpoint, dataset, "--limit", "2"))
    (dataset / "out" / "llava-demo-rel_att.meta.json").unlink()
    shutil.rmtree(dataset / "out" / "llava-demo-rel_att.parts")
    with pytest.raises(SystemExit, match="no .meta.json that tells how its records were made"):
        run.main(options(checkpoint, dataset))
    run.main(options(checkpoint, dataset, "--limit", "2"))  # nothing is open
    with pytest.raises(SystemExit, match="no .meta.json that tells how its records were made"):
        run.main(options(checkpoint, dataset))
    run.main(options(checkpoint, dataset, "--overwrite"))
    assert len(results(dataset, "rel_att")) == 3


def test_a_restart_by_a_launcher_goes_on_also_with_overwrite(checkpoint, dataset, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    run.main(options(checkpoint, dataset, "--method", "center_crop"))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    run.main(options(checkpoint, dataset, "--overwrite"))
    asked = count_calls(monkeypatch, ImageSession, "answers")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.main(options(checkpoint, dataset, "--overwrite"))
    assert not asked
    for more in (["--method", "center_crop"], ["--layer", "1"]):  # another job's, another command's
        run.main(options(checkpoint, dataset, "--overwrite", *more))
        assert asked
        asked.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    run.main(options(checkpoint, dataset, "--overwrite"))
    assert asked


def test_only_the_records_of_a_list(checkpoint, dataset):
    (dataset / "ids.txt").write_text("3\n1\n")
    run.main(options(checkpoint, dataset, "--ids", str(dataset / "ids.txt")))
    assert [record["id"] for record in results(dataset, "rel_att")] == ["1", "3"]
    run.main(options(checkpoint, dataset))
    assert [record["id"] for record in results(dataset, "rel_att")] == ["1", "2", "3"]


def test_the_bar_shows_what_is_done_and_the_score_so_far(checkpoint, dataset, capsys):
    run.main(options(checkpoint, dataset, "--limit", "1"))
    records = json.loads((dataset / "out" / "llava-demo-rel_att.json").read_text())
    capsys.readouterr()
    data = json.loads((dataset / "data.json").read_text())
    data[0]["labels"] = [records[0]["crop_answer"]]
    run.main(options(checkpoint, dataset, "--method", "rel_att,center_crop"))
    bar = capsys.readouterr().err
    assert "0/3" in bar  # of the second method nothing is done yet
    assert "3/3" in bar
    assert "question/s" in bar
    assert all(f"{shown}=" in bar for shown in ("no crop", "rel_att", "center_crop"))


def test_a_method_that_fails_takes_no_other_with_it(checkpoint, dataset):
    records = json.loads((dataset / "data.json").read_text())
    records[0]["gt_bbox"] = None
    write(dataset, records)
    run.main(options(checkpoint, dataset, "--method", "gt_crop,rel_att"))
    failed, fine = results(dataset, "gt_crop"), results(dataset, "rel_att")
    assert ["error" in record for record in failed] == [True, False, False]
    assert not any("error" in record for record in fine)
    assert [record["original_answer"] for record in failed] == [record["original_answer"] for record in fine]


def test_a_limit_and_then_the_rest(checkpoint, dataset):
    run.main(options(checkpoint, dataset, "--limit", "2"))
    assert len(results(dataset, "rel_att")) == 2
    run.main(options(checkpoint, dataset))
    run.main(options(checkpoint, dataset, "--limit", "1"))
    assert [record["id"] for record in results(dataset, "rel_att")] == ["1", "2", "3"]


def test_a_wrong_layer_leaves_nothing_behind(checkpoint, dataset):
    with pytest.raises(SystemExit):
        run.main(options(checkpoint, dataset, "--layer", "9"))
    run.main(options(checkpoint, dataset, "--layer", "1"))
    assert len(results(dataset, "rel_att")) == 3
    with pytest.raises(SystemExit, match="layer was 1 and is now 2"):
        run.main(options(checkpoint, dataset, "--layer", "2"))
    before = results(dataset, "rel_att")
    with pytest.raises(SystemExit, match="layers 0 to 3"):  # old results go only when new ones can come
        run.main(options(checkpoint, dataset, "--layer", "9", "--overwrite"))
    assert results(dataset, "rel_att") == before
    run.main(options(checkpoint, dataset, "--layer", "2", "--overwrite"))


def count_calls(monkeypatch, kind, name):
    """A list that grows by one object with each call of a class's method."""
    calls, method = [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *a, **more: calls.append(self) or method(self, *a, **more))
    return calls


def test_methods_share_the_work(checkpoint, dataset, monkeypatch):
    """The language model reads an image once, whatever is asked."""
    begun, new = [], prefix_cache.new_cache
    monkeypatch.setattr(prefix_cache, "new_cache", lambda decoder: begun.append(decoder) or new(decoder))
    run.main(options(checkpoint, dataset, "--method", "rel_att,grad_att,center_crop"))
    assert len(begun) == 2  # two images


def test_methods_share_the_tiles(checkpoint, dataset, monkeypatch):
    """The vision tower encodes an image once, and its tiles once; and then only crops."""
    encoded = count_calls(monkeypatch, LlavaAdapter, "encode_images")
    methods = ["rel_att", "rel_att_high", "grad_att_high"]
    run.main(options(checkpoint, dataset, "--method", ",".join(methods)))
    boxes = zip(*([record["bbox"] for record in results(dataset, method)] for method in methods), strict=True)
    crops = sum(len(set(map(tuple, each))) for each in boxes)  # methods that agree on a box share its answer
    assert len(encoded) == 2 + 2 + crops  # two images, two sets of tiles


def test_a_map_with_nan_is_an_error_of_its_record(checkpoint, dataset, monkeypatch):
    broken = np.full((1, 4, 4), np.nan, dtype=np.float32)
    monkeypatch.setattr("vicrop.methods.MapMethod.maps", lambda *_, **__: broken)
    with pytest.raises(SystemExit, match="no record could be answered"):
        run.main(options(checkpoint, dataset))
    assert all("16 of the importance map's 16 cells" in record["error"] for record in results(dataset, "rel_att"))


def test_one_picture(checkpoint, tmp_path, capsys):
    photo(300, 200).save(tmp_path / "photo.png")
    common = ["--model", "llava", "--model_id", checkpoint, "--device", "cpu", "--save_path", tmp_path]
    ask = ["--image", tmp_path / "photo.png", "--question", "what is $x_$ on the red sign?"]
    run.main([str(option) for option in [*common, *ask, "--method", "rel_att,center_crop"]])
    printed = capsys.readouterr().out
    assert printed.count("without crop:") == printed.count("with crop:") == 2
    for method in ("rel_att", "center_crop"):
        assert load_image(tmp_path / f"photo-llava-{method}.png").width > 500


def test_a_photo_that_a_camera_has_turned_is_seen_upright(checkpoint, tmp_path, capsys):
    upright, exif = photo(120, 300), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    printed = []
    for name in ("upright", "turned"):
        ask = ["--image", tmp_path / f"{name}.png", "--question", "what?", "--save_path", tmp_path / name]
        run.main([str(each) for each in ["--model", "llava", "--model_id", checkpoint, "--device", "cpu", *ask]])
        printed.append(capsys.readouterr().out.replace(name, ""))
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--task", "textqva"], "textvqa"),
        (["--model", "lava"], "llava"),
        (["--method", "rel_atn"], "rel_att, grad_att"),
        (["--layer", "9"], "layers 0 to 3"),
        (["--layer", "1", "--method", "pure_grad"], "reads pixels"),
        (["--loc_heads", "L9H0", "--method", "loc_att"], "L9H0 does not exist: this model has layers 0 to 3"),
        (["--question_path", "missing.json"], "missing.json"),
        (["--chunk_id", "2", "--total_chunks", "2"], "--chunk_id must be 0 to --total_chunks - 1, 1, got 2"),
        (["--overwrite", "--total_chunks", "2"], "forgets all records"),
        (["--overwrite", "--limit", "2"], "forgets all records"),
        (["--ids", "nowhere.txt"], "nowhere.txt"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--max_image_pixels", "178956971"], "max_image_pixels must be 1 to 178956970, got 178956971"),
        (["--max_image_pixels", "0"], "max_image_pixels must be 1 to 178956970, got 0"),
        (["--layer", "foo"], "neither a layer number"),
        (["--loc_heads", "14.24", "--method", "loc_att"], "'14.24' is no attention head"),
        (["--loc_heads", "data/demo/data.json", "--method", "loc_att"], "data.json is no localization_heads.json"),
        (["--loc_heads", "gone.json", "--method", "loc_att"], "no file gone.json"),
        (["--loc_heads", ",".join(f"L9H{n}" for n in range(99)), "--method", "loc_att"], "L9H0 does not exist"),
        (["--image", "missing.png", "--question", "what?", "--save_maps"], "--save_maps is about the questions"),
        (["--device", "meta"], "'meta' is no device"),
        (["--loc_heads", "L2H1"], "rel_att reads no heads"),
        (["--layer", "1", "--method", "center_crop"], "reads no layer"),
        (["--device", "gpu"], "'gpu' cannot be used here"),
        (["--image_path", "imagez"], "no image folder at imagez"),
        (["--question", "what?"], "--question needs --image"),
        (["--image", "missing.png", "--question", "what?"], "missing.png"),
        (["--image", "missing.png", "--question", " "], "not empty"),
    ],
)
def test_a_wrong_option_gives_one_clear_sentence(checkpoint, dataset, capsys, more, says):
    with pytest.raises(SystemExit) as stopped:
        run.main(options(checkpoint, dataset, *more))
    sentence = capsys.readouterr().err + str(stopped.value.code)
    assert says in sentence
    assert "Traceback" not in sentence


def test_the_tables_fit_together():
    for row in MODELS.values():
        module = importlib.import_module(row["module"])
        assert all(
            callable(getattr(module, name))
            for name in ("rel_att", "grad_att", "pure_grad", "MODEL_CLASS", "load_processor")
        )
        assert "{question}" in module.PROMPT
    assert {grader for row in TASKS.values() for grader in row["metrics"].values()} == GRADERS.keys()
