"""Every record exactly once, through kills, torn lines and concurrent processes."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from records import Results, check_record, load_task

RECORDS = [{"id": str(number), "question": "q", "labels": ["a"], "image_path": "a.png"} for number in range(20)]


def write(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_tasks_load_from_a_list_from_lines_and_with_a_byte_order_mark(tmp_path):
    as_list, lines = json.dumps(RECORDS), "\n".join(map(json.dumps, RECORDS))
    for text in (as_list, lines, "\ufeff" + as_list):
        assert load_task(write(tmp_path, text)) == RECORDS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps([*RECORDS, RECORDS[3]]), "records 3 and 20 have the same id '3'"),
        (json.dumps([RECORDS[0], {"question": "q"}]), "record 1"),
        ("{'a': 1}", "neither a JSON list nor JSON lines"),
        ('{"id": 1}[', "neither"),
        ("3", "holds a int"),
    ],
)
def test_broken_tasks_are_refused_by_name(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        load_task(write(tmp_path, text))


def test_a_missing_task_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere/data.json"):
        load_task("nowhere/data.json")


@pytest.mark.parametrize("change", [{"question": " "}, {"question": None}, {"image_path": "../../secret.png"}])
def test_a_bad_record_is_refused_by_name(tmp_path, change):
    with pytest.raises(ValueError, match="record '0'"):
        check_record(RECORDS[0] | change, tmp_path)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "m-t-x.json"
    first = Results(path, {"layer": 1})
    for record in RECORDS[:7]:
        first.append(record | {"crop_answer": "1"})
    assert first.merge(RECORDS, RECORDS) == (13, {})
    part = next(first.parts.glob("*.jsonl"))
    part.write_text(part.read_text()[:-10])  # the kill tore the last line
    second = Results(path, {"layer": 1})
    assert list(second.done()) == [record["id"] for record in RECORDS[:6]]
    for record in reversed(RECORDS[6:]):
        second.append(record | {"crop_answer": "2"})
    assert second.merge(RECORDS, RECORDS) == (0, {})
    merged = json.loads(path.read_text())
    assert [record["id"] for record in merged] == [record["id"] for record in RECORDS]
    assert [record["crop_answer"] for record in merged] == ["1"] * 6 + ["2"] * 14
    assert not second.parts.exists()
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
