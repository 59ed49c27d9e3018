"""Runs on several processes, killed at random moments: in the end it is as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil  # accelerate needs it, too
import pytest
from families import saved
from test_run import alike

from vicrop.dataset import load_task
from vicrop.evaluation import command as run
from vicrop.evaluation import report
from vicrop.evaluation import score_table as get_score
from vicrop.evaluation.result_files import result_path
from vicrop.evaluation.results import Results
from vicrop.evaluation.scores import ScoreOptions
from vicrop.files import ROOT
from vicrop.map_files import read_maps

NAME = "llava_tiny-demo-rel_att"


def start(processes, folder, *more):
    """A run of the demo under `accelerate launch`."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [
        *launch,
        *(["--multi_gpu"] if processes > 1 else ["--cpu"]),
        "run.py",
        "--device",
        "cpu",
        "--batch_size",
        "1",
        "--save_maps",
        "--save_path",
        str(folder),
        *more,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(folder, name=NAME):
    return Results(folder / f"{name}.json", {}).poll()


def kill_when(process, folder, count, name=NAME):
    """SIGKILL to a launcher and all that it has started, once so many records are in the part files."""
    while len(finished(folder, name)) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.1))
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]  # the workers are in sessions of their own
    for each in family:
        each.kill()
    psutil.wait_procs(family)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of a run of one process that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run.main(["--task", "demo", "--device", "cpu", "--batch_size", "1", "--save_maps", "--save_path", str(folder)])
    return folder


def test_ten_kills_lose_nothing_and_repeat_nothing(undisturbed, tmp_path):
    random.seed(1)
    total, count, left = len(load_task("data/demo/data.json")), 0, 10
    for kill in range(left):
        process = start(kill % 3 + 1, tmp_path)
        kill_when(process, tmp_path, count + random.randint(1, 2 * (total - count) // (left - kill + 1)))
        now = finished(tmp_path)
        count = len({record["id"] for record in now})
        assert len(now) == count < total  # nothing is done twice
    last = start(2, tmp_path)
    assert last.communicate()[0].count(f"{NAME}.json: {total} records") >= 1
    assert last.returncode == 0
    expected, found = (json.loads((folder / f"{NAME}.json").read_text()) for folder in (undisturbed, tmp_path))
    assert [record["id"] for record in found] == [record["id"] for record in load_task("data/demo/data.json")]
    alike(found, expected)
    maps = [read_maps(folder / f"{NAME}.maps.npz") for folder in (undisturbed, tmp_path)]
    assert list(maps[0]) == list(maps[1]) == [record["id"] for record in found]
    for key, (att_map, region) in maps[0].items():
        assert maps[1][key][1] == region
        assert np.abs(maps[1][key][0] - att_map).max() <= 1e-3 * att_map.max()
    scores = [get_score.report(folder, folder, ScoreOptions()) for folder in (undisturbed, tmp_path)]
    assert scores[0] == scores[1]
    assert not (tmp_path / f"{NAME}.parts").exists()
    runs = json.loads((tmp_path / f"{NAME}.meta.json").read_text())["runs"]
    assert {each["processes"] for each in runs.values()} == {1, 2, 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_after_its_batch_and_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, "run.py", "--device", "cpu", "--save_path", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not finished(tmp_path) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {signal.Signals(number).name}: the same command goes on" in err
    assert "records to come" in out
    assert "Traceback" not in err
    assert 0 < len(finished(tmp_path)) < 360


def test_two_runs_of_the_same_job_at_once_spoil_nothing(undisturbed, tmp_path):
    few = [record["id"] for record in load_task("data/demo/data.json")[:24]]
    (tmp_path / "ids.txt").write_text("\n".join(few))
    both = [start(1, tmp_path, "--ids", str(tmp_path / "ids.txt")) for _ in range(2)]
    assert [(process.communicate()[0], process.returncode)[1] for process in both] == [0, 0]
    found = json.loads((tmp_path / f"{NAME}.json").read_text())
    expected = json.loads((undisturbed / f"{NAME}.json").read_text())
    alike(found, [record for record in expected if record["id"] in few])


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_run_all_on_a_folder_goes_on_after_a_kill_scores_and_reports(tmp_path, family):
    model, out = saved(family, tmp_path / "weights"), tmp_path / "out"
    command = ["bash", str(ROOT / "run_all.sh"), "demo", str(model), "rel_att", "--limit", "8", "--batch_size", "1"]
    command += ["--device", "cpu", "--save_path", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )

    path = result_path(out, str(model), "demo", "rel_att")
    kill_when(start(), out, 3, path.stem)
    count = len(finished(out, path.stem))
    assert 3 <= count < 8
    last = start()
    assert f"{path.name}: 8 records" in last.communicate()[0]
    assert last.returncode == 0
    records = json.loads(path.read_text())
    assert [record["id"] for record in records] == [record["id"] for record in load_task("data/demo/data.json")[:8]]
    assert not any("error" in record for record in records)
    assert path.with_suffix(".meta.json").is_file()
    rows = json.loads((out / "evaluation_report.json").read_text())
    assert {(row["task"], row["method"]) for row in rows} == {("demo", "rel_att")}
    report.main([str(path), "--maps", "saved"])
    assert records[0]["question"] in path.with_suffix(".html").read_text()
