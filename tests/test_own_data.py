"""Own data: a folder with questions is a task, its results are its own, and a metric may be anybody's function."""

import json
import sys
import types
from functools import partial

import pytest
from builders import photo

from vicrop import load_model, vicrop_qa
from vicrop.ask_command import main as ask
from vicrop.evaluation import own_metrics, report
from vicrop.evaluation.command import main, parse
from vicrop.evaluation.metrics import graded, metrics_named, note_on_few_labels
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.score_table import main as score
from vicrop.evaluation.tasks import chosen_task
from vicrop.files import ROOT, read_json
from vicrop.hub import HubDataset
from vicrop.tables import TASKS

METRICS = '''
def close_enough(answer, labels):
    """Right if a label is part of the answer, half right else."""
    return 1 if any(label in answer for label in labels) else 0.5

def yes(answer, labels): return True
def five(answer, labels): return 5
def text(answer, labels): return "1"
def nothing(answer, labels): return float("nan")
def fails(answer, labels): return labels["a"]
def alone(answer): return 1
number = 3
'''
QUESTION = {"question": "what number is on the blue sign?", "labels": ["3"], "image_path": "a.jpg"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with a metric of one's own and `made` to make data/NAME."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metrics.py").write_text(METRICS)
    return tmp_path


def made(folder, records, images="images", **task):
    """A folder of own data: records with ids in order, one image, and a task.json if anything is said."""
    (folder / images).mkdir(parents=True)
    photo(60, 50).save(folder / images / "a.jpg")
    records = [QUESTION | {"id": str(number)} | record for number, record in enumerate(records)]
    (folder / "data.json").write_text(json.dumps(records))
    if task:
        (folder / "task.json").write_text(json.dumps(task))
    return folder


def run(*arguments):
    main(["--device", "cpu", "--method", "center_crop", *map(str, arguments)], prog="vicrop run")


def results(place, task, folder="data/results"):
    path = place / folder / f"llava_tiny-{task}-center_crop.json"
    return read_json(path), read_json(path.with_suffix(".meta.json"))


def rows(folder="data/results"):
    return {(row["task"], row["metric"]): row for row in read_json(f"{folder}/evaluation_report.json")}


def stopped(capsys, call):
    """What a command prints of an error: one sentence, and no traceback."""
    with pytest.raises(SystemExit) as end:
        call()
    printed = capsys.readouterr().err + str(end.value.code)
    assert "Traceback" not in printed
    return printed


# -------------------------------------------------------------------------------------------------------------- tasks
def test_a_folder_is_a_task_with_all_that_its_task_json_says(place, capsys):
    prompt = "{question} Answer with one digit."
    metrics = ["../../my_metrics.py:close_enough", "exact"]
    said = {"metric": metrics, "prompt": prompt, "max_new_tokens": 1, "image_path": "pictures"}
    made(place / "data/signs", [{}, {"labels": "no such label"}], "pictures", **said)
    run("--task", "signs")
    found, meta = results(place, "signs")
    assert [record["id"] for record in found] == ["0", "1"]
    assert meta["settings"].items() >= {"task": "signs", "prompt": prompt, "decoding": "greedy, 1 tokens"}.items()
    assert meta["scoring"]["metrics"] == {"close_enough": "../../my_metrics.py:close_enough", "exact": "exact"}
    score(["--save_path", "data/results"])
    assert "close_enough" in capsys.readouterr().out
    assert rows()["signs", "close_enough"]["with_crop"] >= 50
    run("--task", "data/signs")  # by its path it is the same: nothing is left to do
    assert results(place, "signs")[0] == found
    report.main(["data/results/llava_tiny-signs-center_crop.json"])
    assert "close_enough" in (place / "data/results/llava_tiny-signs-center_crop.html").read_text()


def test_the_command_line_goes_before_task_json(place):
    made(place / "data/signs", [{}], metric="anls", prompt="{question} One word.", max_new_tokens=3)
    typed = ["--metric", "my_metrics.py:yes", "--prompt", "{question} One digit.", "--max_new_tokens", "2"]
    settings, _ = parse(["--task", "signs", *typed])
    assert settings.metrics == {"yes": f"{place}/my_metrics.py:yes"}
    assert (settings.model.options["prompt"], settings.model.max_new_tokens) == ("{question} One digit.", 2)
    settings, _ = parse(["--task", "signs"])
    assert (settings.metrics, settings.model.max_new_tokens) == ({"anls": "anls"}, 3)
    settings, _ = parse(["--question_path", "data/signs/data.json"])  # a file's task.json is that beside it
    assert (settings.task, settings.metrics, settings.model.max_new_tokens) == ("signs", {"anls": "anls"}, 3)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"metrc": "exact"}, "unknown field in data/signs/task.json: 'metrc'"),
        ({"metric": 3}, "data/signs/task.json: metric is a metric's name, or a list of names, not 3"),
        ({"metric": []}, "data/signs/task.json: metric is a metric's name, or a list of names, not []"),
        ({"metric": "exakt"}, "data/signs/task.json: metric: unknown metric 'exakt'"),
        ({"metric": "gone.py:f"}, "data/signs/task.json: metric: no file"),
        ({"prompt": "Answer."}, "data/signs/task.json: prompt is a text with {question} in it once, not 'Answer.'"),
        ({"prompt": 7}, "data/signs/task.json: prompt is a text with {question} in it once, not 7"),
        ({"max_new_tokens": 0}, "data/signs/task.json: max_new_tokens is a whole number from 1 on, not 0"),
        ({"max_new_tokens": "20"}, "data/signs/task.json: max_new_tokens is a whole number from 1 on, not '20'"),
        ({"image_path": ["a"]}, "data/signs/task.json: image_path is the folder of the images, as seen from this file"),
        (["exact"], "data/signs/task.json is no object"),
    ],
)
def test_a_wrong_task_json_is_named_with_its_field_and_what_is_valid(place, capsys, said, says):
    made(place / "data/signs", [{}])
    (place / "data/signs/task.json").write_text(json.dumps(said))
    assert says in stopped(capsys, partial(run, "--task", "signs"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "sings"], "signs"),
        (["--task", "sings"], "questions of your own would be in data/sings/data.json"),
        (["--task", "texvqa", "--question_path", "data/signs/data.json"], "did you mean the task textvqa?"),
        (["--task", "signs", "--split", "test"], "--split and --subset are about a dataset of the hub"),
        (["--question_path", "data/signs/data.json", "--split", "test"], "data/signs/data.json is a file"),
        (["--task", "signs", "--metric", "exakt"], "unknown metric 'exakt'"),
        (["--task", "signs", "--metric", "exact,exact"], "two metrics are called 'exact'"),
        (["--task", "signs", "--metric", "gone.py:close_enough"], "gone.py, which is named as the file of a metric"),
        (["--task", "signs", "--metric", "my_metrics.py:far"], "my_metrics.py has no function 'far'"),
        (["--task", "signs", "--metric", "my_metrics.py:number"], "my_metrics.py has no function 'number'"),
        (["--task", "signs", "--metric", "my_metrics.py:alone"], "is called as alone(answer, labels)"),
        (["--task", "signs", "--metric", "broken.py:f"], "broken.py cannot be run: NameError"),
        (["--task", "signs", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--task", "signs", "--prompt", "Answer."], "{question} exactly once"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(place, capsys, arguments, says):
    made(place / "data/signs", [{}])
    (place / "broken.py").write_text("nowhere")
    assert says in stopped(capsys, partial(run, *arguments))


def test_results_are_called_as_their_questions_and_never_meet(place):
    for name in ("signs", "streets"):
        made(place / "data" / name, [{}])
    (place / "data/signs/more.json").write_text((place / "data/signs/data.json").read_text())
    for question in (["--task", "signs"], ["--question_path", "data/streets/data.json"],
                     ["--question_path", "data/signs/more.json"],
                     ["--question_path", "data/signs/more.json", "--task", "night"]):  # fmt: skip
        run(*question)
    names = sorted(path.name for path in (place / "data/results").glob("*_crop.json"))
    assert names == [f"llava_tiny-{name}-center_crop.json" for name in ("more", "night", "signs", "streets")]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--prompt", "{question} One digit."], "prompt was"),
        (["--max_new_tokens", "3"], "decoding was 'greedy, 20 tokens' and is now 'greedy, 3 tokens'"),
    ],
)
def test_a_run_goes_on_only_as_it_was_asked(place, capsys, more, says):
    made(place / "data/signs", [{}, {}])
    run("--task", "signs", "--limit", "1")
    assert says in stopped(capsys, partial(run, "--task", "signs", *more))


def test_a_run_goes_on_with_another_metric_and_is_scored_by_it(place):
    made(place / "data/signs", [{}, {}])
    run("--task", "signs", "--limit", "1")
    run("--task", "signs", "--metric", "my_metrics.py:yes")
    found, meta = results(place, "signs")
    assert len(found) == 2
    assert meta["scoring"]["metrics"] == {"yes": "../../my_metrics.py:yes"}
    score(["--save_path", "data/results"])
    assert rows()["signs", "yes"]["with_crop"] == 100


def test_answers_are_as_long_as_they_may_be(place, capsys):
    image, prompt = ROOT / "data/demo/images/scene_00001.jpg", "{question} Describe the image."
    model, processor = load_model("llava_tiny", device="cpu")
    asked = partial(vicrop_qa, "llava_tiny", "center_crop", image, "what?", model, processor, prompt=prompt)
    (short, *_), (whole, *_) = asked(max_new_tokens=1), asked()
    assert whole.startswith(short)
    assert len(processor.tokenizer(short, add_special_tokens=False).input_ids) <= 1
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        asked(max_new_tokens=0)
    arguments = [str(image), "what?", "--method", "center_crop", "--device", "cpu", "--prompt", prompt]
    ask([*arguments, "--max_new_tokens", "1"])
    assert f"without crop: {short} (" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ metrics
def test_a_function_of_ones_own_is_a_metric(place):
    found = metrics_named(["exact", "my_metrics.py:close_enough"])
    assert list(found) == ["exact", "close_enough"]
    grade = partial(graded, grader=found["close_enough"])
    assert grade("it is 7", {"id": 1, "labels": "7"}) == 100
    assert grade("it is 7", {"id": 1, "labels": ["8", "9"]}) == 50
    with pytest.raises(ValueError, match="record 1: labels are"):
        grade("7", {"id": 1, "labels": []})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("five", "must return a number from 0 to 1, not 5"),
        ("text", "must return a number from 0 to 1, not '1'"),
        ("nothing", "must return a number from 0 to 1, not nan"),
        ("fails", "fails: TypeError"),
    ],
)
def test_what_is_no_score_names_the_record_and_the_function(place, function, says):
    (name,) = metrics_named([f"my_metrics.py:{function}"]).values()
    with pytest.raises(ValueError, match=rf"record '7': {function}\('a', \['b'\]\) {says}"):
        graded("a", {"id": "7", "labels": ["b"]}, name)


def test_a_moved_project_is_scored_as_before_and_a_changed_metric_is_named(place, capsys):
    made(place / "here/data/signs", [{}])
    (place / "here/my_metrics.py").write_text(METRICS)
    run("--task", "here/data/signs", "--metric", "here/my_metrics.py:yes", "--save_path", "here/out")
    (place / "here").rename(place / "there")
    score(["--data_dir", "there/out", "--save_path", "there/out"])
    assert rows("there/out")["signs", "yes"]["n"] == 1
    assert "changed" not in capsys.readouterr().err
    with (place / "there/my_metrics.py").open("a") as file:
        file.write("\n")
    score(["--data_dir", "there/out", "--save_path", "there/out"])
    assert "my_metrics.py has changed since these answers were given" in capsys.readouterr().err


@pytest.mark.parametrize("grader", ["vqa_paper", "textvqa", "vqav2", "aokvqa_direct"])
def test_it_is_said_where_a_right_answer_cannot_be_wholly_right(grader):
    """The bound is sharp: with so many labels a right answer is, with one fewer it is not."""
    full = next(n for n in range(1, 11) if graded("a", {"id": 1, "labels": ["a"] * n}, grader) == 100)
    few, enough = ({"id": 1, "labels": ["a"] * count} for count in (full - 1, full))
    assert "as 1 records have" in note_on_few_labels([few, enough], grader)
    assert note_on_few_labels([enough, {"id": 2}], grader) is None
    assert note_on_few_labels([few], "exact") is None


# ------------------------------------------------------------------------------------------------------------- scores
def test_records_without_labels_are_answered_and_counted_as_unscored(place, capsys):
    made(place / "data/photos", [{"labels": None}, {"labels": []}, {"labels": None, "image_path": "gone.jpg"}])
    run("--task", "photos")
    assert "3 of 3 records have no labels: they are answered, and not scored" in capsys.readouterr().err
    assert [bool(record["crop_answer"]) for record in results(place, "photos")[0]] == [True, True, False]
    score(["--save_path", "data/results"])
    printed = capsys.readouterr()
    assert printed.err.count("3 of 3 records have no labels, and are not scored") == 1
    row = rows()["photos", "exact"]
    assert (row["n"], row["unscored"], row["errors"]) == (0, 3, 1)
    report.main(["data/results/llava_tiny-photos-center_crop.json"])
    page = (place / "data/results/llava_tiny-photos-center_crop.html").read_text()
    assert "3 of 3 records have no labels" in page
    assert page.count('"ungraded"') >= 3


def test_boxes_are_judged_without_labels(place, capsys):
    asked = {"labels": None, "image_size": [60, 50]}
    made(place / "data/photos", [asked | {"gt_bbox": box} for box in ([0, 0, 60, 50], [0, 0, 9, 9], None)])
    run("--task", "photos", "--metric", "box_point,exact")
    score(["--save_path", "data/results", "--by", "nothing"])
    assert {metric: row["n"] for (_, metric), row in rows().items()} == {"box_point": 2, "exact": 0}
    assert rows()["photos", "box_point"]["with_crop"] == 50
    assert "record '2': image_size and gt_bbox are needed" in capsys.readouterr().err
    report.main(["data/results/llava_tiny-photos-center_crop.json"])
    page = (place / "data/results/llava_tiny-photos-center_crop.html").read_text()
    assert page.count('"outcome":"ungraded"') == 1


def test_a_folder_of_several_tasks_is_scored_as_far_as_it_can_be(place, capsys):
    for name, metric in (("signs", "my_metrics.py:yes"), ("night", "other.py:best,exact"), ("fog", "other.py:best")):
        made(place / "data" / name, [{}])
        (place / "other.py").write_text("def best(answer, labels): return 1\n")
        run("--task", name, "--metric", metric)
    made(place / "data/photos", [{"labels": None}])
    run("--task", "photos")
    (place / "other.py").unlink()
    for remembered in (own_metrics.own_metric, own_metrics.module_of):  # as in another process
        remembered.cache_clear()
    out = place / "data/results"
    answered = QUESTION | {"id": "1", "original_answer": "3", "crop_answer": "3", "bbox": [0, 0, 9, 9]}
    (out / "llava-gqa-rel_att.json").write_text(json.dumps([answered]))
    (out / "llava-chart-rel_att.json").write_text(json.dumps([answered]))
    score(["--save_path", "data/results"])
    said = capsys.readouterr().err
    assert "unknown task 'chart'" in said
    assert "its metric best cannot be used (--metric names another): no file" in said
    found = rows()
    assert {(*key, row["n"]) for key, row in found.items()} == {
        ("gqa", "paper", 1), ("gqa", "official", 1), ("signs", "yes", 1), ("night", "exact", 1), ("photos", "exact", 0)
    }  # fmt: skip
    score(["--save_path", "data/results", "--metric", "my_metrics.py:close_enough"])  # in place of all that they have
    assert {key: row["n"] for key, row in rows().items()} == {
        (task, "close_enough"): int(task != "photos") for task in ("gqa", "signs", "night", "fog", "photos")
    }
    with pytest.raises(SystemExit):
        score(["--save_path", "data/results", "--metric", "exakt"])
    assert "unknown metric 'exakt'" in capsys.readouterr().err


def test_a_page_is_judged_by_any_metric(place, capsys):
    made(place / "data/signs", [{}])
    run("--task", "signs")
    path = "data/results/llava_tiny-signs-center_crop.json"
    report.main([path, "--metric", "my_metrics.py:yes"])
    assert '"metric":"yes"' in (place / path).with_suffix(".html").read_text()
    assert "unknown metric of signs 'exakt'" in stopped(capsys, lambda: report.main([path, "--metric", "exakt"]))


@pytest.mark.parametrize("scoring", [3, {}, {"metrics": {"a": 3}, "sha256": {}}, {"metrics": {"a": "b"}, "sha256": []}])
def test_a_broken_meta_file_is_named(place, scoring, capsys):
    made(place / "data/signs", [{}])
    run("--task", "signs")
    meta = place / "data/results/llava_tiny-signs-center_crop.meta.json"
    meta.write_text(json.dumps(read_json(meta) | {"scoring": scoring}))
    assert "meta.json is none that run.py has written" in stopped(capsys, lambda: score(["--save_path", "out"]))


def test_a_benchmark_keeps_its_metrics_whatever_it_is_made_of():
    for name, row in TASKS.items():
        task = chosen_task(name)
        assert (task.metrics, task.question_path, str(task.image_path)) == (
            row["metrics"], row["question_path"], row["image_path"]
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- hub
class Rows:
    """A dataset as the library `datasets` gives it, as far as it is used here."""

    def __init__(self, rows, kinds):
        self.rows, self.features = rows, kinds

    def cast_column(self, name, kind):
        assert (self.features[name].decode, kind.decode) == (True, False)
        return self

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch):
    """What stands for the library `datasets`; `hub.rows` is what it loads, `hub.asked` what was asked for."""
    image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    stub = types.SimpleNamespace(Image=image, asked=[], rows=None)
    stub.load_dataset = lambda name, subset, split: stub.asked.append((name, subset, split)) or stub.rows
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


def test_a_dataset_of_the_hub_is_copied_once_with_its_images(place, hub, capsys):
    photo(60, 50).save(place / "a.png")
    content = (place / "a.png").read_bytes()
    rows = [{"question": "what?", "answers": ["3"], "photo": {"bytes": content, "path": None}, "raw": b"\0"},
            {"question": "who?", "answers": [{"a": 1}], "photo": {"bytes": None, "path": str(place / "a.png")}},
            {"question": "why?", "answers": [], "photo": None}]  # fmt: skip
    hub.rows = Rows(rows, {"question": str, "answers": list, "photo": hub.Image(), "raw": bytes})
    for _ in range(2):
        run("--question_path", "someone/signs", "--split", "validation", "--subset", "small")
    assert hub.asked == [("someone/signs", "small", "validation")]
    folder = place / "data/someone--signs_small_validation"
    records = read_json(folder / "data.json")
    (name,) = [path.name for path in (folder / "images").iterdir()]  # one file for one content
    assert (folder / "images" / name).read_bytes() == content
    common = {"photo": name, "image_path": name}
    assert records[:2] == [
        {"id": "0", "question": "what?", "answers": ["3"], "labels": ["3"], **common},
        {"id": "1", "question": "who?", "answers": [{"a": 1}], **common},
    ]
    said = capsys.readouterr().err
    for part in ("no column id", "labels, so they are those of answers", "raw cannot be written as JSON"):
        assert said.count(part) == 1
    found, _ = results(place, "someone__signs_small_validation")
    assert ["error" in record for record in found] == [False, False, True]


def test_what_a_dataset_has_of_its_own_stays(place, hub):
    rows = [QUESTION | {"id": "x", "answers": ["no"]}]
    hub.rows = Rows(rows, dict.fromkeys(rows[0]))
    dataset = HubDataset("someone/signs", "test", place / "copy")
    dataset.fetch()
    assert read_json(dataset.questions) == rows


def test_a_dataset_that_cannot_be_read_leaves_nothing_behind(place, hub, monkeypatch, capsys):
    for rows in ([{"id": "1"}, {"id": 1}], [{"image": {"bytes": b"no image", "path": None}}]):
        hub.rows = Rows(rows, dict.fromkeys(rows[0]) | {"image": hub.Image()} if "image" in rows[0] else rows[0])
        said = stopped(capsys, partial(run, "--question_path", "someone/signs"))
        assert "someone/signs: ids must differ" in said or "someone/signs, row 0: image is no image" in said
        assert not list(place.rglob("data.json"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in stopped(capsys, partial(run, "--question_path", "someone/signs"))


def test_the_library_itself_gives_what_the_stub_does(place):
    datasets = pytest.importorskip("datasets")
    photo(60, 50).save(place / "a.png")
    rows = [{"question": "what?", "labels": ["3"], "image": str(place / "a.png")}] * 2
    built = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (place / "built").mkdir()
    built.to_parquet(str(place / "built" / "validation.parquet"))
    dataset = HubDataset("built", "validation", place / "copy")
    dataset.fetch()
    (name,) = {record["image_path"] for record in read_json(dataset.questions)}
    assert (place / "copy/images" / name).read_bytes() == (place / "a.png").read_bytes()
    with pytest.raises(ValueError, match="built has no split 'other'"):
        HubDataset("built", "other", place / "other").fetch()


def test_a_result_knows_its_metrics_without_its_data(place):
    made(place / "data/signs", [{}])
    run("--task", "signs", "--metric", "my_metrics.py:yes,anls")
    (place / "data/signs/data.json").unlink()
    file = ResultFile.read("data/results/llava_tiny-signs-center_crop.json")
    assert file.metrics == {"yes": f"{place}/my_metrics.py:yes", "anls": "anls"}
    assert file.missing == 0
