"""The page of results, in a real browser: what it shows is what the files say, and it needs nothing but itself."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from playwright.sync_api import expect

from vicrop.evaluation import batching, columns, report
from vicrop.evaluation import command as run
from vicrop.evaluation.ensembles import ensemble_rows
from vicrop.evaluation.gates import risk_coverage_area
from vicrop.evaluation.metrics import score
from vicrop.evaluation.page_scores import risk_curves
from vicrop.evaluation.provenance import length_of_answers
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, rows_of
from vicrop.files import ROOT
from vicrop.map_files import read_maps, write_maps
from vicrop.tables import MAX_NEW_TOKENS


@pytest.fixture
def opened(browser):
    """Opens a page of the disk; at the end: it fetched nothing but itself, and its console stayed empty."""
    fetched, said, pages = [], [], []

    def open_page(path, width=1300, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append((page, path.as_uri()))
        page.on("request", lambda request: fetched.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        return page

    yield open_page
    assert {url.partition("#")[0] for url in fetched} == {uri for _, uri in pages}
    assert said == []
    for page, _ in pages:
        page.close()


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The folder of a real run: llava_tiny on some demo questions, with its maps."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--method", "rel_att,rel_att_high,center_crop", "--limit", "24", "--save_maps", "--device", "cpu"]
    run.main(["--model", "llava_tiny", "--task", "demo", "--save_path", str(folder), *arguments])
    return folder


@pytest.fixture(scope="session")
def page_file(results):
    report.main([str(results / "llava_tiny-demo-rel_att.json")])
    return results / "llava_tiny-demo-rel_att.html"


def outcomes_of(path):
    """{"fixed": number, ...} of a result file."""
    names = {(0, 100): "fixed", (100, 0): "broken", (100, 100): "both right", (0, 0): "both wrong"}
    return Counter(names[score(record, "exact")] for record in json.loads(path.read_text()))


def hand_made(folder, records, method="rel_att"):
    """A result file of somebody's own about the demo images, without anything beside it."""
    common = {"question": "what?", "labels": ["1"], "image_path": "scene_00001.jpg", "original_answer": "1",
              "crop_answer": "1", "bbox": [9, 9, 99, 99]}  # fmt: skip
    path = folder / f"mine-demo-{method}.json"
    path.write_text(json.dumps([common | {"id": number} | record for number, record in enumerate(records)]))
    return path


# ---------------------------------------------------------------------------------------------------------------- maps
def test_maps_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    shapes, scales = [(3, 4), (1, 1), (7, 2), (2, 2)], [1e-12, 1, 1e20, 0]
    maps = {key: (scale * rng.random(shape, dtype=np.float32), (-5, 0, 20, 9))
            for key, shape, scale in zip([1, "1", "a/b", "file"], shapes, scales, strict=True)}  # fmt: skip
    write_maps(tmp_path / "x.npz", maps)
    read = read_maps(tmp_path / "x.npz")
    assert list(read) == list(maps)
    for key, (att_map, region) in maps.items():
        assert read[key][0].dtype == np.float32
        assert read[key][1] == region
        assert np.abs(read[key][0] - att_map).max() <= 5e-4 * att_map.max()
    write_maps(tmp_path / "again.npz", read)
    again = read_maps(tmp_path / "again.npz")
    assert all(np.array_equal(again[key][0], read[key][0]) for key in maps)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="torn.npz holds no saved maps"):
        read_maps(tmp_path / "torn.npz")


@pytest.mark.parametrize("method", ["rel_att", "rel_att_high"])
def test_saved_maps_are_those_that_are_made_again(results, tmp_path, method):
    saved = report.maps_of(ResultFile.read(results / f"llava_tiny-demo-{method}.json"))
    for path in results.glob(f"llava_tiny-demo-{method}.*json"):
        shutil.copy(path, tmp_path)
    again = report.maps_of(
        ResultFile.read(tmp_path / f"llava_tiny-demo-{method}.json"), {"device": "cpu", "device_map": None}
    )
    assert len(saved) == 24
    assert saved.keys() == again.keys()
    for key, (att_map, region) in again.items():
        assert saved[key][1] == region
        assert np.abs(saved[key][0] - att_map).max() <= 1e-3 * att_map.max()


def test_the_length_of_answers_is_read_off_a_result(results):
    """A search that is made again is led by the confidence in answers that are as long."""
    made = json.loads((results / "llava_tiny-demo-rel_att.meta.json").read_text())["settings"]["decoding"]
    assert length_of_answers(made) == length_of_answers(None) == MAX_NEW_TOKENS
    assert length_of_answers("greedy, 7 tokens") == 7


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_page_counts_filters_and_searches(opened, results, page_file):
    page = opened(page_file)
    counts = outcomes_of(results / "llava_tiny-demo-rel_att.json")
    assert counts["fixed"]
    labels = page.locator("#outcome button").all_inner_texts()
    assert [" ".join(label.split()[1:]) for label in labels[1:]] == [
        f"{name} {counts[name]}" for name in ("fixed", "broken", "both wrong", "both right") if counts[name]
    ]
    assert page.locator(".card").count() == 24
    page.locator("#outcome button", has_text="fixed").click()
    assert page.locator(".card").count() == page.locator(".card.fixed").count() == counts["fixed"]
    records = json.loads((results / "llava_tiny-demo-rel_att.json").read_text())
    small = [r for r in records if score(r, "exact") == (0, 100) and r["size"] == "small"]
    button = page.locator("#size button", has_text="small")
    assert button.inner_text() == f"small {len(small)}"  # a button tells what it would show
    button.click()
    shown = page.locator("#count").inner_text()
    assert shown.startswith(f"{len(small)} of 24")
    page.fill("#text", small[0]["id"])
    card = page.locator(".card")
    assert card.count() == 1
    said = card.text_content()  # not inner_text: that of a card is empty until it is first drawn
    assert small[0]["question"] in said
    assert f"✘ {small[0]['original_answer']}" in said
    assert f"✔ {small[0]['crop_answer']}" in said
    page.fill("#text", "nothing like it")
    assert button.inner_text() == "small 0"
    assert page.locator("#end").inner_text() == "No question passes these filters."


def test_the_keyboard_goes_through_the_page(opened, page_file):
    page = opened(page_file)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    cards = page.locator(".card")
    assert "current" in cards.nth(2).get_attribute("class")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    large = page.locator("#large .card")
    assert large.text_content() == cards.nth(1).text_content()
    page.keyboard.press("ArrowRight")
    assert large.text_content() == cards.nth(2).text_content()
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.keyboard.press("m")
    assert not page.locator(".stage canvas").first.is_visible()
    page.keyboard.press("/")
    page.keyboard.type("no such m")
    assert page.input_value("#text") == "no such m"
    assert cards.count() == 0
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""
    assert cards.count() == 24
    page.keyboard.press("t")
    expect(page.locator(".gt").first).to_be_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # on the button that closes
    expect(page.locator("#viewer")).to_be_hidden()


def test_one_may_go_on_at_once_where_the_viewer_was_left(opened, page_file):
    page = opened(page_file)
    page.locator(".card").nth(1).click()
    for leave in ("document.getElementById('close').click()", "press('Escape')"):
        page.evaluate(
            """() => {
                const press = (key) => document.activeElement.dispatchEvent(
                    new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
                LEAVE;
                press("/");
            }""".replace("LEAVE", leave)
        )
        page.wait_for_timeout(200)  # whatever the browser does later takes the focus from nobody
        expect(page.locator("#viewer")).to_be_hidden()
        expect(page.locator("#text")).to_be_focused()
        page.locator(".card").nth(2).click()
    page.evaluate("leave(); select(1); enlarge(); undefined")  # open again before the browser says that it was closed
    page.wait_for_timeout(200)
    expect(page.locator("#viewer")).to_be_visible()
    page.evaluate("select(2); document.getElementById('viewer').close()")  # as a phone's way back does
    expect(page.locator(".card").nth(2)).to_be_focused()


def test_what_one_does_with_the_mouse_leaves_the_keyboard_alone(opened, page_file):
    page = opened(page_file)
    cards = page.locator(".card")
    cards.nth(1).locator("h2").click()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")  # one is where one has gone to, not where one came from
    expect(cards.nth(4)).to_contain_class("current")
    page.locator("#map").click()
    page.keyboard.press("ArrowRight")
    assert "current" in cards.nth(5).get_attribute("class")
    page.keyboard.press("m")
    assert page.locator(".stage canvas").first.is_visible()
    page.locator("#size button", has_text="small").focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.value") == "small"
    assert page.locator(".card").count() == page.locator(".card", has_text="small object").count()


def test_the_score_table_is_that_of_get_score(opened, results, page_file):
    page = opened(page_file)
    page.locator("#figures summary").click()
    shown = [row.split("\t") for row in page.locator("#scores tbody tr").all_inner_texts()]
    path = results / "llava_tiny-demo-rel_att.json"
    rows = rows_of(ResultFile.read(path), ScoreOptions())
    assert [row["part"] for row in rows] == ["all", "small", "medium", "large"]
    left_out = {"task", "model", "method", "metric", "errors"}  # alike in all rows
    for row, line in zip(rows, shown, strict=True):
        cells = zip(columns.COLUMNS, columns.cells(row), strict=True)
        assert [cell for name, cell in cells if name not in left_out] == line


@pytest.mark.parametrize("region", [(0, 0, 594, 446), (74, 0, 520, 446), (0, -74, 594, 520)])
def test_a_map_lies_exactly_on_its_region(opened, tmp_path, region):
    path = hand_made(tmp_path, [{}])
    write_maps(path.with_suffix(".maps.npz"), {0: (np.arange(12, dtype=np.float32).reshape(3, 4), region)})
    report.main([str(path)])
    page = opened(path.with_suffix(".html"))
    image, heat, box = (page.locator(f".stage {part}").bounding_box() for part in ("img", "canvas", ".box"))
    scale = image["width"] / 594
    for found, (x1, y1, x2, y2) in ((heat, region), (box, (9, 9, 99, 99))):
        wanted = {"x": image["x"] + scale * x1, "y": image["y"] + scale * y1}
        wanted |= {"width": scale * (x2 - x1), "height": scale * (y2 - y1)}
        assert found == pytest.approx(wanted, abs=0.6)
    pixels = "[...document.querySelector('.stage canvas').getContext('2d').getImageData(0, 0, 4, 3).data]"
    strengths = page.evaluate(pixels)[3::4]  # how opaque each cell is
    assert strengths == sorted(strengths)
    assert len(set(strengths)) == 12  # row by row, from the smallest to the largest


def test_methods_side_by_side(opened, results, tmp_path):
    files = [str(results / f"llava_tiny-demo-{method}.json") for method in ("rel_att", "center_crop")]
    report.main([*files, str(results / "llava_tiny-demo-rel_att.meta.json"), "--out", str(tmp_path / "both.html")])
    page = opened(tmp_path / "both.html")
    card = page.locator(".card").first
    assert card.locator(".panel h3 span:first-child").all_text_contents() == [
        "llava_tiny, rel_att",
        "llava_tiny, center_crop",
    ]
    assert card.locator("canvas").count() == 1
    assert "cropped where it looked (the heat is" in page.locator("header").inner_text()
    for number, method in enumerate(("rel_att", "center_crop")):
        page.select_option("#result", str(number))
        fixed = outcomes_of(results / f"llava_tiny-demo-{method}.json")["fixed"]
        label = page.locator("#outcome button", has_text="fixed")
        assert [text.split()[-1] for text in label.all_inner_texts()] == ([str(fixed)] if fixed else [])


def test_five_thousand_records_stay_usable(opened, tmp_path):
    rng = np.random.default_rng(0)
    records = [
        {"id": f"q{number}", "image_path": f"scene_{number % 140:05d}.jpg", "bbox": [x, y, x + 112, y + 112]}
        for number, (x, y) in enumerate(rng.integers(0, 300, (5000, 2)).tolist())
    ]
    report.main([str(hand_made(tmp_path, records)), "--maps", "saved"])
    assert (tmp_path / "mine-demo-rel_att.html").stat().st_size < 50e6
    page = opened(tmp_path / "mine-demo-rel_att.html")
    assert page.locator(".card").count() <= 48  # what is far below is not there yet, nor are its images
    for _ in range(100):  # they come as one scrolls
        if page.locator(".card").count() > 48:
            break
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(50)
    assert page.locator(".card").count() > 48
    page.fill("#text", "q4999")
    assert page.locator(".card").count() == 1
    assert page.locator("#count").inner_text().startswith("1 of 5000")


def test_a_tall_window_is_filled_also_after_a_filter(browser, page_file):
    page = browser.new_page(viewport={"width": 700, "height": 12000})
    page.goto(page_file.as_uri())
    page.locator(".card").nth(23).wait_for()
    page.locator("#outcome button", has_text="fixed").click()
    page.locator("#outcome button").first.click()
    page.locator(".card").nth(23).wait_for()
    page.close()


def luminance(color):
    """Of a CSS colour "rgb(r, g, b)", as WCAG defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_and_all_texts_can_be_read(opened, page_file, scheme):
    page = opened(page_file, width=390, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#figures summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    color = "element => getComputedStyle(element)."
    paper = [page.locator(name).first.evaluate(color + "backgroundColor") for name in ("body", ".card")]
    assert (luminance(paper[0]) > 0.5) == (scheme == "light")
    for name in ("h1", ".card h2", ".card .faint", "dt", "dd", ".tag", ".yes", ".no", "th", "#count", ".legend"):
        ink = page.locator(name).first.evaluate(color + "color")
        low, high = sorted((luminance(ink), luminance(paper[name.startswith((".", "d"))])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_shares_of_a_right_answer_are_shown_and_the_metric_that_gives_them(opened, tmp_path):
    labels = ["cat"] * 2 + ["dog"] * 7 + ["cow"]
    record = {"labels": labels, "image_path": "none.jpg"}
    pairs = [("cat", "the dog"), ("cow", "cat"), ("emu", "cow")]
    records = [record | {"original_answer": before, "crop_answer": after} for before, after in pairs]
    path = hand_made(tmp_path, records).rename(tmp_path / "mine-textvqa-rel_att.json")
    shown = ["✘ cow (30 %)", "✔ cat (60 %)", "✘ emu", "✘ cow (30 %)", "✔ cat (60 %)", "✔ the dog"]
    for metric in ("paper", "official"):
        report.main([str(path), "--maps", "saved", "--metric", metric])
        page = opened(path.with_suffix(".html"))
        assert page.locator("dd").all_text_contents() == shown
        assert f'by the metric "{metric}"' in page.locator("#count").inner_text()
        tags = page.locator(".tag").all_text_contents()
        assert tags == ["✔ fixed", "○ both wrong", "● both right"]  # better is not fixed yet, nor broken
        page.locator("#figures summary").click()
        rows = page.locator("#scores tbody tr").all_inner_texts()
        assert all(row.split("\t")[-3:-1] == ["1", "0"] for row in rows)  # fixed, broken: as in the gallery


def test_texts_are_shown_as_they_are_and_errors_are_said(opened, tmp_path):
    nasty = "</script><script>document.title = 'gone'</script> <b>&amp; \u2028 "
    failed = {"original_answer": "", "crop_answer": "", "bbox": None}
    records = [{"question": nasty, "category": 1}, failed | {"error": "no memory", "category": 2}]
    records += [{"image_path": "gone.jpg"}, {"bbox": [9, 9, 9, 9], "gt_bbox": "left"}]
    records += [{"bbox": [1, 2, 3]}, {"bbox": "left"}, {"bbox": [-9, -9, 1e9, 1e9]}, {"labels": 3}]
    records += [{"image_size": [0, 0], "gt_bbox": [1, 2, 3, 4]}]
    report.main([str(hand_made(tmp_path, records)), "--maps", "saved"])
    page = opened(tmp_path / "mine-demo-rel_att.html")
    assert page.title() == "mine, demo, rel_att"
    assert nasty in page.locator(".card h2").all_text_contents()
    said = page.locator("#gallery").text_content()
    assert "no memory" in said
    assert "no image file" in said
    page.select_option("#category", "2")
    assert page.locator(".card").count() == 1


def test_records_without_labels_are_shown_ungraded(opened, tmp_path):
    report.main([str(hand_made(tmp_path, [{"labels": []}, {"labels": None}])), "--maps", "saved"])
    page = opened(tmp_path / "mine-demo-rel_att.html")
    assert page.locator(".card.ungraded").count() == 2
    assert "No scores: record 0: labels are" in page.locator("#same").inner_text()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("mine-demo-grad_att.json", '[{"id": ', "mine-demo-grad_att.json is no complete JSON file"),
        ("mine-demo-grad_att.json", "3", "mine-demo-grad_att.json holds a int"),
        ("mine-demo-magic.json", "[]", "unknown method 'magic'"),
        ("other.json", "[]", "other.json in .* is not named MODEL-TASK-METHOD.json"),
        (
            "mine-demo-rel_att.meta.json",
            "{",
            "meta.json is no complete JSON file.*: mine-demo-rel_att.json is taken without",
        ),
    ],
)
def test_a_bad_file_costs_the_page_only_itself(tmp_path, capsys, name, text, says):
    path = hand_made(tmp_path, [{}, {"labels": None}, {"original_answer": 3}])
    (tmp_path / name).write_text(text)
    report.main([str(path), str(tmp_path / name), "--maps", "saved", "--out", str(tmp_path / "x.html")])
    said = capsys.readouterr().err
    assert re.search(says, said)
    assert all(f"rel_att.json: record {number}: " in said for number in (1, 2))
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Records that cannot be scored and are not in n: mine rel_att exact 2." in page
    assert "unknown method" not in page


@pytest.mark.parametrize(("limit", "shown"), [("264924", True), ("264923", False)])  # the image has 594 x 446
def test_a_large_picture_is_shown_once_it_is_allowed(tmp_path, monkeypatch, limit, shown):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    path = hand_made(tmp_path, [{}])
    report.main([str(path), "--maps", "saved", "--max_image_pixels", limit])
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert ("is refused: it has 264924 pixels" in page) == (not shown)
    with pytest.raises(SystemExit):
        report.main([str(path), "--maps", "saved", "--max_image_pixels", "178956971"])


@pytest.mark.parametrize("about", [{"settings": {"layer": 1}}, {"settings": {"model": "llava"}, "runs": {"a": {}}}])
def test_a_meta_file_that_lacks_how_maps_are_made_is_a_sentence(tmp_path, about):
    path = hand_made(tmp_path, [{}])
    path.with_suffix(".meta.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match=r"rel_att.meta.json must tell how to make maps, and has no .*model_id"):
        report.main([str(path)])


@pytest.mark.parametrize(
    ("files", "more", "says"),
    [
        (["mine-demo-rel_att.json"], [], "no .meta.json that tells how to make them: use --maps saved"),
        (["mine-demo-rel_att.json"], ["--metric", "official"], "unknown metric of demo 'official': choose from exact"),
        (["gone-demo-rel_att.json"], [], "no result file at"),
        (["mine-demo-rel_att.json", "mine-gqa-rel_att.json"], [], "one task, not demo, gqa"),
        (["other.json"], [], "is not named MODEL-TASK-METHOD.json"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(tmp_path, files, more, says):
    path = hand_made(tmp_path, [{}])
    for name in ("mine-gqa-rel_att.json", "other.json"):
        shutil.copy(path, tmp_path / name)
    with pytest.raises(SystemExit, match=says):
        report.main([*(str(tmp_path / name) for name in files), *more])
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [("weights", "vicrop/embedded/llava has other weights"), ("prompt", "was made by other prompts")],
)
def test_maps_are_not_made_again_by_something_else(results, tmp_path, setting, says):
    (tmp_path / "llava_tiny-demo-rel_att.json").write_text((results / "llava_tiny-demo-rel_att.json").read_text())
    about = json.loads((results / "llava_tiny-demo-rel_att.meta.json").read_text())
    about["settings"][setting] = "others"
    (tmp_path / "llava_tiny-demo-rel_att.meta.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match=says):
        report.main([str(tmp_path / "llava_tiny-demo-rel_att.json")])


def test_results_of_more_and_fewer_questions_are_told_apart(opened, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    paths = [hand_made(tmp_path, [{}, {}, {}]), hand_made(tmp_path / "other", [{}])]
    report.main([*map(str, paths), "--maps", "saved", "--out", str(tmp_path / "x.html")])
    note = "The results are not about the same questions (mine-demo-rel_att 3, mine-demo-rel_att 1; 1 in common)"
    assert note in capsys.readouterr().err
    page = opened(tmp_path / "x.html")
    assert note in page.locator("#same").inner_text()
    names = page.locator(".panel h3 span:first-child").all_text_contents()
    assert {name.rpartition("/")[2] for name in names} == {f"{tmp_path.name})", "other)"}
    assert page.locator("#gt-switch").is_hidden()
    assert "cropped (the red box is the crop)" in page.locator("header").inner_text()  # there are no maps


def test_results_of_other_questions_do_not_stand_side_by_side(tmp_path):
    one = hand_made(tmp_path, [{}, {"id": "x"}])
    other = hand_made(tmp_path, [{}, {"id": "x", "question": "who?"}], method="grad_att")
    with pytest.raises(SystemExit, match=r"'x' is \('who\?', .*grad_att.json"):
        report.main([str(one), str(other), "--maps", "saved"])


@pytest.mark.parametrize("size", [1, 3])
def test_maps_that_were_made_again_are_kept(results, tmp_path, capsys, monkeypatch, size):
    monkeypatch.setitem(batching.BATCH_SIZES, "cpu", size)
    for path in results.glob("llava_tiny-demo-rel_att.*json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "llava_tiny-demo-rel_att.json"
    records = json.loads(path.read_text())[:3]
    records[1]["image_path"] = "gone.jpg"
    path.write_text(json.dumps(records))
    report.main([str(path)])
    assert f"no map of {records[1]['id']}: no image file" in capsys.readouterr().err
    maps, saved = (read_maps(folder / "llava_tiny-demo-rel_att.maps.npz") for folder in (tmp_path, results))
    assert sorted(maps) == sorted([records[0]["id"], records[2]["id"]])
    for key, (att_map, region) in maps.items():
        assert saved[key][1] == region
        assert np.abs(saved[key][0] - att_map).max() <= 1e-3 * att_map.max()


@pytest.fixture(scope="session")
def page_of_two(results):
    """The page of two methods, side by side."""
    out = results / "two.html"
    files = [str(results / f"llava_tiny-demo-{method}.json") for method in ("rel_att", "center_crop")]
    report.main([*files, "--out", str(out)])
    return out


def records_of(results, method):
    return json.loads((results / f"llava_tiny-demo-{method}.json").read_text())


def hit(record):
    """Whether a record's crop contains the middle of the true place."""
    (x1, y1, x2, y2), (left, top, right, bottom) = record["gt_bbox"], record["bbox"]
    return left <= (x1 + x2) / 2 <= right and top <= (y1 + y2) / 2 <= bottom


@pytest.mark.parametrize(("width", "share"), [(1300, 0.7), (390, 0.9)])
def test_enlarge_enlarges(opened, page_file, width, share):
    page = opened(page_file, width=width)
    card = page.locator(".card").first
    small = card.locator("img").first.bounding_box()
    card.locator("h2").click()
    picture = page.locator("#large .stage")
    large = picture.bounding_box()
    assert large["width"] > 1.3 * small["width"]
    assert large["width"] >= share * width or large["height"] >= share * 900
    assert large["x"] >= 0
    assert large["x"] + large["width"] <= width
    assert page.evaluate("document.getElementById('viewer').scrollWidth") <= width
    image, shown = page.locator("#large .plane img"), page.locator("#whole")

    for key, times in (("+", 1.5), ("=", 2.25), ("-", 1.5)):
        page.keyboard.press(key)
        assert image.bounding_box()["width"] == pytest.approx(times * large["width"], rel=0.01)
        assert shown.inner_text() == f"{100 * times:.0f} %"
    page.keyboard.press("0")
    assert image.bounding_box() == pytest.approx(large, abs=1)

    x, y = large["x"] + large["width"] / 4, large["y"] + large["height"] / 4
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)  # a picture grows about the pointer
    page.wait_for_function("document.getElementById('whole').textContent !== '100 %'")
    zoomed = image.bounding_box()
    assert (x - zoomed["x"]) / zoomed["width"] == pytest.approx(0.25, abs=0.01)
    page.mouse.down()
    page.mouse.move(x - 40, y - 30)
    page.mouse.up()
    moved = image.bounding_box()
    assert [moved["x"] - zoomed["x"], moved["y"] - zoomed["y"]] == pytest.approx([-40, -30], abs=1)
    page.mouse.dblclick(x, y)
    assert image.bounding_box() == pytest.approx(large, abs=1)  # the whole picture again


def test_two_fingers_pinch(opened, page_file):
    page = opened(page_file, width=390)
    page.locator(".card h2").first.click()
    large = page.locator("#large .stage").bounding_box()
    x, y = large["x"] + large["width"] / 2, large["y"] + large["height"] / 2
    session = page.context.new_cdp_session(page)
    for kind, apart in (("Start", 40), ("Move", 60), ("Move", 80), ("End", None)):
        points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    expect(page.locator("#whole")).to_have_text("200 %")
    assert page.locator("#large .plane img").bounding_box()["width"] == pytest.approx(2 * large["width"], rel=0.01)


def test_the_hottest_cell_hides_nothing(opened, page_file):
    """However the slider stands, what lies below can be seen; the hottest cells have a line around them."""
    page = opened(page_file)
    slider = page.locator("nav .strength")
    slider.fill("0.7")  # as far as it goes
    assert slider.get_attribute("max") == "0.7"
    assert page.locator(".stage canvas").first.evaluate("e => Number(getComputedStyle(e).opacity)") <= 0.7
    assert page.locator("#legend").evaluate("e => Number(getComputedStyle(e).opacity)") == 0.7  # in the map's colours
    cells = """element => {
        const pixels = (canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        const legend = new Map(), own = pixels(document.getElementById("legend"));
        for (let at = 0; at < own.length; at += 4) legend.set(own[at + 3], own.slice(at, at + 3).join());
        const all = pixels(element);
        return all.every((_, at) => at % 4 || !all[at + 3] || legend.get(all[at + 3]) === all.slice(at, at + 3).join());
    }"""
    assert page.locator(".stage canvas").first.evaluate(cells)  # a cell's colour is the legend's of its value
    assert page.locator(".stage svg path").first.get_attribute("d").startswith("M")


def test_methods_and_sizes_are_one_matrix(opened, results, page_of_two):
    page = opened(page_of_two)
    assert page.locator("#matrix thead th").all_inner_texts()[1:] == ["all", "small", "medium", "large"]
    lines = page.locator("#matrix tbody tr")
    assert [lines.nth(n).locator("td").first.inner_text() for n in range(3)] == [
        "without crop", "rel_att", "center_crop",
    ]  # fmt: skip
    for number, method, field in ((0, "rel_att", 0), (1, "rel_att", 1), (2, "center_crop", 1)):
        shown = [text.split() for text in lines.nth(number).locator("td").all_inner_texts()[1:]]
        for size, (share, _, count) in zip((None, "small", "medium", "large"), shown, strict=True):
            pairs = [score(r, "exact") for r in records_of(results, method) if size in (None, r["size"])]
            assert count == str(len(pairs))
            assert float(share) == pytest.approx(np.mean([pair[field] for pair in pairs]), abs=0.051)


def test_the_surer_answer_has_rows_and_a_filter(opened, results, page_of_two):
    page = opened(page_of_two)
    files = [ResultFile.read(results / f"llava_tiny-demo-{name}.json") for name in ("rel_att", "center_crop")]
    rows = page.locator("#matrix tbody tr")
    shown = {rows.nth(n).locator("td").first.inner_text(): rows.nth(n).locator("td").nth(1).inner_text().split()[0]
             for n in range(rows.count())}  # fmt: skip
    for file in files:
        (row, *_) = rows_of(file, ScoreOptions())
        assert float(shown[f"{file.method}, the surer of both answers"]) == pytest.approx(row["surer"], abs=0.051)
    for row in ensemble_rows(files, ScoreOptions()):
        if "best" in row:
            named = f"all results together, {row['member']}"
            assert float(shown[named]) == pytest.approx(row["score"], abs=0.051)
    with_crop = [record["id"] for record in files[0].records
                 if record["confidence"]["crop"] >= record["confidence"]["original"]]  # fmt: skip
    assert 0 < len(with_crop) < 24
    page.locator("#surer button", has_text="surer with crop").click()
    assert page.locator("#count").inner_text().startswith(f"{len(with_crop)} of 24")
    expect(page).to_have_url(re.compile("#surer=with"))
    page.locator("#surer button", has_text="surer without").click()
    assert page.locator("#count").inner_text().startswith(f"{24 - len(with_crop)} of 24")


def test_risk_is_drawn_by_coverage(opened, results, page_of_two):
    page = opened(page_of_two)
    page.locator("#risks summary").click()
    named = page.locator("#risk li").all_inner_texts()
    file = ResultFile.read(results / "llava_tiny-demo-rel_att.json")
    scores = [score(record, "exact") for record in file.records]
    sure = [record["confidence"] for record in file.records]
    for at, number, field in ((0, 0, "original"), (1, 1, "crop")):
        area = risk_coverage_area([pair[number] for pair in scores], [each[field] for each in sure])
        assert named[at].strip().endswith(f"{area:.1f} %")
    assert [text.split(": ")[0].strip() for text in named] == [
        "llava_tiny, without crop", "llava_tiny, rel_att", "llava_tiny, rel_att, the surer of both answers",
        "llava_tiny, center_crop", "llava_tiny, center_crop, the surer of both answers",
    ]  # fmt: skip
    assert page.locator("#risk > svg .curve").count() == 5
    (curve, *_) = risk_curves([file], "exact")
    assert curve["points"][-1] == pytest.approx([100, 100 - np.mean([before for before, _ in scores])], abs=0.01)


def test_without_confidence_there_is_neither_a_curve_nor_a_filter(opened, tmp_path):
    report.main([str(hand_made(tmp_path, [{}, {}])), "--maps", "saved"])
    page = opened(tmp_path / "mine-demo-rel_att.html")
    assert page.locator("#risks").is_hidden()
    assert page.locator("#surer button").count() == 0
    assert page.locator("#matrix tbody tr").count() == 2


def test_filters_tell_where_methods_disagree_and_what_was_hit(opened, results, page_of_two):
    page = opened(page_of_two)
    one, other = (records_of(results, method) for method in ("rel_att", "center_crop"))
    differ = [a["id"] for a, b in zip(one, other, strict=True) if a["crop_answer"] != b["crop_answer"]]
    assert differ
    page.locator("#methods button", has_text="methods disagree").click()
    assert page.locator("#count").inner_text().startswith(f"{len(differ)} of 24")
    page.locator("#methods button").first.click()
    for number, records in enumerate((one, other)):
        page.select_option("#result", str(number))
        for name, count in (("true place hit", sum(map(hit, records))), ("missed", sum(not hit(r) for r in records))):
            button = page.locator("#place button", has_text=name)
            if count:
                button.click()
                assert page.locator(".card").count() == count


def test_the_address_says_what_is_shown_and_back_goes_back(opened, page_of_two):
    page = opened(page_of_two)
    page.locator("#size button", has_text="small").click()
    page.locator("#methods button", has_text="disagree").click()
    small = page.locator(".card").count()
    page.locator(".card h2").first.click()
    page.keyboard.press("ArrowRight")
    second = page.evaluate("shown[1].id")
    expect(page).to_have_url(re.compile(rf"#size=small&methods=disagree&id={second}&large=yes$"))
    large, url = page.locator("#large .card").text_content(), page.url
    page.go_back()
    expect(page.locator("#viewer")).to_be_hidden()
    assert page.locator(".card").count() == small
    page.go_back()
    assert "methods" not in page.url
    assert page.locator("#methods button").first.get_attribute("aria-pressed") == "true"
    page.go_forward()
    assert page.locator(".card").count() == small

    page.goto("about:blank")
    page.goto(url)  # shared, or reloaded
    assert page.locator("#large .card").text_content() == large
    page.keyboard.press("Escape")
    assert page.locator(".card").count() == small
    expect(page).to_have_url(re.compile("#size=small&methods=disagree&id=[^&]+$"))
    page.fill("#text", "the & sign #1")
    expect(page).to_have_url(re.compile("text=the\\+%26\\+sign\\+%231"))
    page.goto("about:blank")
    page.goto(page_of_two.as_uri() + "#size=huge&result=9&id=gone&large=yes")  # what there is not is not asked for
    assert page.locator("#count").inner_text().startswith("24 of 24")


def test_ids_of_what_is_shown_are_copied(opened, results, page_file):
    page = opened(page_file)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#size button", has_text="small").click()
    page.locator("#copy").click()
    small = {record["id"] for record in records_of(results, "rel_att") if record["size"] == "small"}
    expect(page.locator("#copy")).to_have_text(f"copied {len(small)} ids")
    copied = page.evaluate("navigator.clipboard.readText()").split()
    assert len(copied) == len(small)
    assert set(copied) == small


def test_the_page_says_how_its_results_were_made(opened, results, page_of_two):
    page = opened(page_of_two)
    page.locator("#made summary").click()
    about = json.loads((results / "llava_tiny-demo-rel_att.meta.json").read_text())["settings"]
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in page.locator("#settings tr").all_inner_texts()}
    assert rows["weights"] == [about["weights"]]  # alike, said once
    assert rows["method"] == ["rel_att", "center_crop"]
    assert rows["dtype"] == ["float32"]
    assert "torch" in rows


def test_gated_records_confidence_and_several_boxes_are_shown(opened, tmp_path):
    records = [{"bbox": None, "gated": True, "confidence": {"original": 0.973, "crop": 0.973}},
               {"bboxes": [[9, 9, 99, 99], [200, 100, 300, 200]], "gt_bbox": [240, 140, 260, 160],
                "confidence": "high"},
               {"bboxes": "none"}]  # fmt: skip
    report.main([str(hand_made(tmp_path, records)), "--maps", "saved"])
    page = opened(tmp_path / "mine-demo-rel_att.html")
    gated, several, plain = (page.locator(".card").nth(number) for number in range(3))
    assert "97 % sure" in gated.text_content()
    assert "no crop: sure enough" in gated.text_content()
    assert gated.locator(".box").count() == gated.locator(".crop").count() == 0
    assert several.locator(".box:not(.gt)").count() == several.locator(".crop").count() == 2
    assert "sure" not in several.text_content() + plain.text_content()
    assert plain.locator(".box").count() == 1
    page.locator("#gt").check()
    assert page.locator("#place button").count() == 0  # all that have a true place hit it


def test_a_question_about_two_places_is_hit_where_crops_show_both(opened, tmp_path):
    """The box around both has its middle between them; what is not there has no place, though a box of all of it."""
    two = {"gt_bbox": [0, 0, 300, 200], "gt_bboxes": [[20, 20, 40, 40], [240, 140, 260, 160]]}
    records = [two | {"bboxes": [[9, 9, 99, 99], [200, 100, 300, 200]]},
               two | {"bboxes": [[9, 9, 99, 99]]},
               two | {"bboxes": [[100, 50, 200, 150]]},
               {"gt_bbox": [0, 0, 300, 200], "gt_bboxes": [], "bboxes": [[100, 50, 200, 150]]}]  # fmt: skip
    report.main([str(hand_made(tmp_path, records)), "--maps", "saved"])
    page = opened(tmp_path / "mine-demo-rel_att.html")
    page.locator("#gt").check()
    assert [page.locator(".card").nth(number).locator(".gt").count() for number in range(4)] == [2, 2, 2, 0]
    for name, count in (("true place hit", 1), ("missed", 2)):
        page.locator("#place button", has_text=name).click()
        assert page.locator(".card").count() == count


def test_pictures_are_large_where_there_are_few(tmp_path):
    few = [ResultFile.read(hand_made(tmp_path, [{}]))]
    many = [{"image_path": f"{number}.jpg"} for number in range(5000)]
    assert report.sides_of(few) == (1600, 320)
    assert report.sides_of([ResultFile.read(hand_made(tmp_path, many))])[0] < 300
    several = [{"bboxes": [[9, 9, 99, 99]] * 4}] * 5000
    assert report.sides_of([ResultFile.read(hand_made(tmp_path, several))])[1] ** 2 * 20_000 <= report.CROP_PIXELS


def test_the_template_is_whole():
    text = (ROOT / "vicrop" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert text.count("<!-- images and data -->") == 1
    assert "http" not in text.replace("http-equiv", "")
