"""Every record exactly once, through kills, torn lines and concurrent processes."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vicrop.dataset import box_of, check_record, load_task, pick, refuse_other_size
from vicrop.evaluation.results import Results, with_outputs

RECORDS = [{"id": str(number), "question": "q", "labels": ["a"], "image_path": "a.png"} for number in range(20)]


def write(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_tasks_load_from_a_list_from_lines_and_with_a_byte_order_mark(tmp_path):
    as_list, lines = json.dumps(RECORDS), "\n".join(map(json.dumps, RECORDS))
    for text in (as_list, lines, "\ufeff" + as_list):
        assert load_task(write(tmp_path, text)) == RECORDS
    assert load_task(write(tmp_path, json.dumps(RECORDS[0]))) == RECORDS[:1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps([*RECORDS, RECORDS[3], RECORDS[5]]), r"'3' \(records 3 and 20\), '5' \(records 5 and 21\)"),
        (json.dumps([RECORDS[0], {"question": "q"}]), "record 1"),
        (json.dumps([RECORDS[0], {"id": ["1"]}]), "record 1"),
        (json.dumps([*RECORDS, "text"]), "record 20 is no object"),
        ("{'a': 1}", "neither a JSON list nor JSON lines"),
        ('{"id": 1}[', "neither"),
        ("3", "holds a int"),
    ],
)
def test_broken_tasks_are_refused_by_name(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        load_task(write(tmp_path, text))


@pytest.mark.parametrize("ids", [(1, "1"), ("20", 20), (0, "0"), (7, 7)])
def test_ids_are_equal_whatever_their_type(tmp_path, ids):
    records = [RECORDS[0] | {"id": key} for key in ("x", *ids, "y")]
    both = repr(ids[0]) if ids[0] == ids[1] else f"{ids[0]!r} and {ids[1]!r}"
    with pytest.raises(ValueError, match=rf"ids must differ, .*: {both} \(records 1 and 2\)"):
        load_task(write(tmp_path, json.dumps(records)))


def test_a_missing_task_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere/data.json"):
        load_task("nowhere/data.json")


def test_a_separator_that_json_allows_in_a_text_does_not_end_a_line(tmp_path):
    records = [RECORDS[0] | {"question": "one\u2028line"}, RECORDS[1]]
    assert load_task(write(tmp_path, "\n".join(json.dumps(each, ensure_ascii=False) for each in records))) == records


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": " "}, "question is a text that is not empty, not ' '"),
        ({"question": "\ud800"}, "question .* has half of a character"),
        ({"question": None}, "has no question"),
        ({"question": 3}, "question is a text that is not empty, not 3"),
        ({"short_question": ["q"]}, "short_question is a text"),
        ({"image_path": ""}, "has no image_path"),
        ({"image_path": {"bytes": "x"}}, "image_path is a text"),
        ({"image_path": "../../secret.png"}, "leaves the image folder"),
        ({"image_path": "/etc/passwd"}, "leaves the image folder"),
        ({"image_path": "link.png"}, "leaves the image folder"),
        ({"labels": 7}, "labels are a text or a list of texts, not 7"),
        ({"labels": ["a", None]}, r"labels are a text or a list of texts, not \['a', None\]"),
        ({"labels": {"a": 1}}, "labels are a text or a list of texts, not"),
        ({"short_question": " "}, "short_question is a text that is not empty, not ' '"),
        ({"image_size": [0, 9]}, r"image_size is \[width, height\] in pixels, not \[0, 9\]"),
        ({"image_size": [9.5, 9]}, r"image_size is \[width, height\] in pixels, not \[9.5, 9\]"),
        ({"image_size": [9]}, r"image_size is \[width, height\] in pixels, not \[9\]"),
        ({"question": None, "image_path": None}, "has no image_path, question"),
    ],
)
def test_a_bad_record_is_refused_by_name(tmp_path, change, says):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=f"record '0'.*{says}"):
        check_record(RECORDS[0] | change, tmp_path / "images")


def test_ids_and_a_limit_pick_records(tmp_path):
    listed = tmp_path / "ids"
    for text in ("7\n3\n\n12\n", '\ufeff[7, "3", 12]'):
        listed.write_text(text, encoding="utf-8")
        assert [record["id"] for record in pick(RECORDS, listed)] == ["3", "7", "12"]  # in the dataset's order
        assert [record["id"] for record in pick(RECORDS, listed, 2)] == ["3", "7"]
    assert pick(RECORDS, None, 2) == RECORDS[:2]
    listed.write_text("3\n33\n")
    with pytest.raises(ValueError, match="1 ids that are not in the dataset: 33"):
        pick(RECORDS, listed)
    listed.write_text('["3", ')
    with pytest.raises(ValueError, match="ids.* is neither a JSON list"):
        pick(RECORDS, listed)
    listed.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="ids.* is no text in UTF-8"):
        pick(RECORDS, listed)
    listed.write_text("")
    with pytest.raises(ValueError, match="no records to ask about: .*ids"):
        pick(RECORDS, listed)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "m-t-x.json"
    first = Results(path, {"layer": 1})
    for record in RECORDS[:7]:
        first.append(record | {"crop_answer": "1"})
    assert first.merge(RECORDS, RECORDS) == (13, {})
    part = next(first.parts.folder.glob("*.jsonl"))
    part.write_text(part.read_text()[:-10])  # the kill tore the last line
    second = Results(path, {"layer": 1})
    assert list(second.done()) == [record["id"] for record in RECORDS[:6]]
    for record in reversed(RECORDS[6:]):
        second.append(record | {"crop_answer": "2"})
    assert second.merge(RECORDS, RECORDS) == (0, {})
    merged = json.loads(path.read_text())
    assert [record["id"] for record in merged] == [record["id"] for record in RECORDS]
    assert [record["crop_answer"] for record in merged] == ["1"] * 6 + ["2"] * 14
    assert not second.parts.folder.exists()
    assert Results(path, {"layer": 1}).done().keys() == {record["id"] for record in RECORDS}


def test_processes_write_side_by_side(tmp_path):
    def process(rank):
        results = Results(tmp_path / "m-t-x.json", {})
        for record in RECORDS[rank::4]:
            results.append(record)
        return results.merge(RECORDS, RECORDS)[0]

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(process, range(4))) == 0
    assert json.loads((tmp_path / "m-t-x.json").read_text()) == RECORDS


def test_other_settings_do_not_mix(tmp_path):
    Results(tmp_path / "m-t-x.json", {"layer": 1, "dtype": "auto"}).append(RECORDS[0])
    fresh = Results(tmp_path / "m-t-x.json", {"layer": 2, "dtype": "auto"})
    with pytest.raises(ValueError, match="layer was 1 and is now 2"):
        fresh.done()
    fresh.clear()
    assert fresh.done() == {}


def test_settings_are_compared_with_what_stands_beside_the_records(tmp_path):
    """Of a run that was killed before its first record nothing stays, so nothing can differ."""
    path = tmp_path / "m-t-x.json"
    Results(path, {"layer": 1}).note(device="cpu")
    fresh = Results(path, {"layer": 2})
    assert fresh.done() == {}
    fresh.append(RECORDS[0])
    with pytest.raises(ValueError, match="seed was None and is now 3; layer was 2 and is now None"):
        Results(path, {"seed": 3}).done()


def test_the_meta_file_tells_who_made_what(tmp_path):
    path = tmp_path / "m-t-x.json"
    for rank in range(2):
        results = Results(path, {"layer": 1})
        results.note(device=f"cuda:{rank}", seconds=0)
        for number, record in enumerate(RECORDS[rank::2], 1):
            results.append(record)
            results.note(seconds=number, forwards=4 * number)
    assert results.merge(RECORDS, RECORDS) == (0, {})
    meta = json.loads(results.meta.read_text())
    assert meta["settings"] == {"layer": 1}
    assert meta["counts"] == {"records": 20, "errors": 0, "dataset": 20}
    assert (meta["seconds"], meta["forwards"]) == (20, 80)
    assert [run["device"] for run in meta["runs"].values()] == ["cuda:0", "cuda:1"]
    again = Results(path, {"layer": 1})
    again.note(device="cpu", seconds=5)
    again.append(RECORDS[0])
    again.merge(RECORDS, RECORDS)
    assert [run["device"] for run in again.provenance()["runs"].values()] == ["cuda:0", "cuda:1", "cpu"]
    assert again.provenance()["seconds"] == 25


def test_a_run_whose_part_was_merged_under_it_loses_nothing(tmp_path):
    path = tmp_path / "m-t-x.json"
    slow, fast = Results(path, {}), Results(path, {})
    slow.append(RECORDS[0] | {"crop_answer": "slow"})
    for record in RECORDS[1:]:
        fast.append(record)
    assert fast.merge(RECORDS, RECORDS) == (0, {})  # this takes the part files away
    slow.append(RECORDS[1] | {"crop_answer": "slow"})
    assert set(Results(path, {}).done()) == {record["id"] for record in RECORDS}
    assert slow.merge(RECORDS, RECORDS) == (0, {})
    answers = [record.get("crop_answer") for record in json.loads(path.read_text())]
    assert answers == ["slow", "slow", *[None] * 18]
    assert not slow.parts.folder.exists()


def test_a_run_that_was_overwritten_with_other_settings_stops(tmp_path):
    old, new = Results(tmp_path / "m-t-x.json", {"layer": 1}), Results(tmp_path / "m-t-x.json", {"layer": 2})
    old.append(RECORDS[0])
    new.clear()
    new.append(RECORDS[0])
    with pytest.raises(ValueError, match="layer was 2 and is now 1"):
        old.append(RECORDS[1])
    assert list(new.done()) == ["0"]


def test_a_part_of_a_dataset_is_merged_and_its_parts_stay_for_the_rest(tmp_path):
    """Another run may be at work on other records: its part file must not be taken away."""
    path = tmp_path / "m-t-x.json"
    other, first = Results(path, {}), Results(path, {})
    other.append(RECORDS[5])
    first.append(RECORDS[0])
    assert first.merge(RECORDS[:1], RECORDS) == (0, {})
    assert json.loads(path.read_text()) == [RECORDS[0], RECORDS[5]]
    other.append(RECORDS[6])
    assert set(Results(path, {}).done()) == {"0", "5", "6"}


def test_polled_records_are_whole_lines_once(tmp_path):
    writer, reader = Results(tmp_path / "m-t-x.json", {}), Results(tmp_path / "m-t-x.json", {})
    assert reader.poll() == []
    writer.append(RECORDS[0])
    assert reader.poll() == [RECORDS[0]]
    (part,) = writer.parts.folder.glob("*.jsonl")
    line = json.dumps(RECORDS[1])
    for half in (line[:9], line[9:] + "\n"):
        assert reader.poll() == []
        with part.open("a") as file:
            file.write(half)
    assert reader.poll() == [RECORDS[1]]


def test_runs_that_overlap_do_not_mix_settings(tmp_path):
    """Both began when nothing was there; the second one to finish a record is refused."""
    path = tmp_path / "m-t-x.json"
    first, second = Results(path, {"layer": 1}), Results(path, {"layer": 2})
    assert first.done() == second.done() == {}
    first.append(RECORDS[0])
    with pytest.raises(ValueError, match="layer was 1 and is now 2"):
        second.append(RECORDS[1])
    assert list(first.done()) == ["0"]


def test_parts_that_lost_their_meta_file_keep_their_settings(tmp_path):
    path = tmp_path / "m-t-x.json"
    Results(path, {"layer": 1}).append(RECORDS[0])
    assert not path.with_suffix(".meta.json").exists()
    with pytest.raises(ValueError, match="layer was 1 and is now 2"):
        Results(path, {"layer": 2}).done()


@pytest.mark.parametrize(
    ("ending", "text", "says"),
    [
        (".json", '[{"id": [1]}]', "m-t-x.json: .*id is a text or a whole number, not \\[1\\]"),
        (".json", "[7]", "m-t-x.json: record 0 is no object but 7"),
        (".meta.json", "[]", "m-t-x.meta.json is none that run.py has written: it must be an object, not a list"),
        (".meta.json", '{"settings": []}', "m-t-x.meta.json .*: its settings must be an object, not a list"),
        (".meta.json", '{"runs": {"a": 1}}', "m-t-x.meta.json .*: each of its runs must be an object"),
        (".parts/1.jsonl", '{"id": [1]}\n', "1.jsonl: .*id is a text or a whole number, not \\[1\\]"),
        (".parts/1.jsonl", '{"settings": []}\n{"id": "1"}\n', "1.jsonl .*its settings must be an object, not a list"),
    ],
)
def test_files_that_no_run_has_written_are_refused_by_name(tmp_path, ending, text, says):
    (tmp_path / "m-t-x.json").write_text('[{"id": "0"}]')
    path = tmp_path / f"m-t-x{ending}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        Results(tmp_path / "m-t-x.json", {}).done()


def test_a_line_of_a_part_that_is_no_object_does_not_count(tmp_path):
    results = Results(tmp_path / "m-t-x.json", {})
    results.parts.folder.mkdir()
    (results.parts.folder / "1.jsonl").write_text('7\n[1]\n{"id": "0"}\n')
    assert list(results.done()) == [line["id"] for line in results.poll()] == ["0"]


def test_a_slow_merge_does_not_undo_a_later_one(tmp_path, monkeypatch):
    """One run is about some records and merges; another finishes the last record of all in the middle of that."""
    path = tmp_path / "m-t-x.json"
    some, rest = Results(path, {}), Results(path, {})
    for record in RECORDS[:-1]:
        some.append(record)
    write, other = Results._write_result, []

    def slow(results, finished, records):
        if results is some:
            rest.append(RECORDS[-1])
            other.append(threading.Thread(target=rest.merge, args=(RECORDS, RECORDS)))
            other[0].start()
            other[0].join(0.2)  # it has to wait
        write(results, finished, records)

    monkeypatch.setattr(Results, "_write_result", slow)
    assert some.merge(RECORDS[:3], RECORDS) == (0, {})
    other[0].join()
    assert json.loads(path.read_text()) == RECORDS


def test_a_broken_result_file_is_named(tmp_path):
    path = tmp_path / "m-t-x.json"
    path.write_text('[{"id": "1"')
    with pytest.raises(ValueError, match="m-t-x.json is no complete JSON file"):
        Results(path, {}).done()


@pytest.mark.parametrize("content", [{"id": "1"}, [{"question": "q"}], [7]])
def test_a_result_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "m-t-x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="m-t-x.json(: record 0| is no list of records)"):
        Results(path, {}).done()


def test_an_error_never_takes_an_answers_place(tmp_path):
    path = tmp_path / "m-t-x.json"
    slow, retry = Results(path, {}), Results(path, {})
    slow.append(RECORDS[0] | {"error": "no memory"})
    assert RECORDS[0]["id"] not in retry.done(retry_errors=True)
    retry.append(RECORDS[0])
    slow.append(RECORDS[1])
    assert slow.merge(RECORDS[:2], RECORDS[:2]) == (0, {})
    assert json.loads(path.read_text()) == RECORDS[:2]
    slow.append(RECORDS[2])  # into a new part, with all that it has written before
    assert slow.merge(RECORDS[:3], RECORDS[:3]) == (0, {})
    assert json.loads(path.read_text()) == RECORDS[:3]


def test_fields_of_a_dataset_may_have_any_name(tmp_path):
    record = RECORDS[0] | {"run": 7, "map_of": "x", "settings": {"layer": 2}, "note": {}}
    results = Results(tmp_path / "m-t-x.json", {"layer": 1})
    results.note(device="cpu")
    results.append(record)
    assert Results(tmp_path / "m-t-x.json", {"layer": 1}).done() == {record["id"]: record}
    assert results.merge([record], [record]) == (0, {})
    assert json.loads((tmp_path / "m-t-x.json").read_text()) == [record]
    assert with_outputs(record | {"error": "label noise", "bbox": 3}, {"bbox": None}) == record | {"bbox": None}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_results_are_written_all_the_same(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    results = Results(tmp_path / "m-t-x.json", {})
    results.append(RECORDS[0])
    assert results.merge(RECORDS[:1], RECORDS[:1]) == (0, {})
    assert json.loads((tmp_path / "m-t-x.json").read_text()) == RECORDS[:1]


def test_fewer_wanted_records_do_not_shrink_the_file(tmp_path):
    results = Results(tmp_path / "m-t-x.json", {})
    for record in RECORDS:
        results.append(record)
    assert results.merge(RECORDS, RECORDS) == (0, {})
    assert Results(tmp_path / "m-t-x.json", {}).merge(RECORDS[:3], RECORDS) == (0, {})
    assert json.loads((tmp_path / "m-t-x.json").read_text()) == RECORDS


def test_errors_are_reported_and_can_be_tried_again(tmp_path):
    results = Results(tmp_path / "m-t-x.json", {})
    for record in RECORDS[:-1]:
        results.append(record)
    results.append(RECORDS[-1] | {"error": "no image"})
    assert results.merge(RECORDS, RECORDS) == (0, {"19": "no image"})
    again = Results(tmp_path / "m-t-x.json", {})
    assert "19" in again.done()
    assert "19" not in again.done(retry_errors=True)
    again.append(RECORDS[-1])
    assert again.merge(RECORDS, RECORDS) == (0, {})
    assert json.loads((tmp_path / "m-t-x.json").read_text()) == RECORDS


def test_a_size_in_whole_numbers_may_be_written_with_a_point(tmp_path):
    record = {"id": "1", "question": "q?", "image_path": "a.png", "image_size": [640.0, 480.0]}
    assert check_record(record, tmp_path).name == "a.png"
    refuse_other_size(record, (640, 480))
    assert box_of(record | {"gt_bbox": [600, 0, 640, 480]}) == (600, 0, 640, 480)
