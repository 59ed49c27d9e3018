"""Localization heads: the criteria by hand, attention against the plain computation, and every stage end to end."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from builders import KINDS, photo
from hydra import compose, initialize_config_dir
from PIL import Image
from plain import PLAIN_KINDS

from vicrop import crop as vicrop
from vicrop import heads as analyze
from vicrop import tables as info
from vicrop.files import ROOT
from vicrop.localization import evaluate_boxes, pipeline, refcoco, storage, viz
from vicrop.localization import grounding as bbox
from vicrop.localization.collector import Collector, stock_generate
from vicrop.localization.config import AttentionFormat, AttentionStorage, AttentionType, ConvMode, Logic, Model


def blobs(*cells, shape=(8, 8), value=1.0):
    """A map of zeros with these cells (row, column) lit."""
    found = np.zeros(shape)
    for cell in cells:
        found[cell] = value
    return found


# ------------------------------------------------------------------------------------------------------- the criteria
@pytest.mark.parametrize(
    ("values", "elbow"),
    [
        ([0.3, 0.0, 1.0, 0.1, 0.2], 0.3),  # distances to the chord 0, 0.15, 0.3, 0.45, 0
        ([0.0, 0.8, 0.9, 1.0], 0.8),  # a curve above its chord
        ([0.0, 1.0, 2.0, 3.0], 0.0),  # straight: everything is kept
        ([0.5], 0.5),
        ([0.2, 0.2, 0.2], 0.2),
    ],
)
def test_the_elbow_is_a_value(values, elbow):
    assert analyze.chord_elbow(values) == elbow


def test_an_elbow_of_nothing_or_nan_is_an_error():
    for values in ([], [0.1, math.nan]):
        with pytest.raises(ValueError, match="finite values"):
            analyze.chord_elbow(values)


@pytest.mark.parametrize(
    ("cells", "entropy"),
    [
        ([(1, 1), (1, 2)], 0.0),
        ([(1, 1), (2, 2)], 0.0),  # cells that touch at a corner are one component
        ([(0, 0), (6, 6)], math.log(2)),
        ([(0, 0), (4, 4), (4, 5), (5, 4)], -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))),
        ([], math.inf),
    ],
)
def test_spatial_entropy_by_hand(cells, entropy):
    assert analyze.spatial_entropy(blobs(*cells)) == pytest.approx(entropy)


def test_components_weigh_by_area_or_by_mass():
    att_map = blobs((0, 0), (6, 6))
    att_map[6, 6] = 3
    assert analyze.spatial_entropy(att_map) == pytest.approx(math.log(2))
    above = att_map[att_map > 0] - att_map.mean()
    shares = above / above.sum()
    assert analyze.spatial_entropy(att_map, weight="mass") == pytest.approx(-(shares * np.log(shares)).sum())
    with pytest.raises(ValueError, match="'size'"):
        analyze.spatial_entropy(att_map, weight="size")


def test_what_is_little_above_the_mean_is_no_component():
    att_map = np.full((4, 4), 0.1)
    att_map[0, 0] += 0.0008
    assert analyze.spatial_entropy(att_map) == math.inf
    assert analyze.spatial_entropy(att_map, binarize_threshold=0.0001) == 0


def test_the_entropies_of_many_maps_are_those_of_each():
    maps = np.random.default_rng(0).random((3, 4, 6, 5)) ** 3
    each = [[analyze.spatial_entropy(att_map) for att_map in row] for row in maps]
    assert np.allclose(analyze.spatial_entropy(maps), each)


def test_a_bottom_row_lit_from_end_to_end():
    whole, part = blobs(*[(7, column) for column in range(8)]), blobs(*[(7, column) for column in range(7)])
    assert analyze.bottom_row_lit(np.stack([whole, part])).tolist() == [True, False]


def heads(*, layers=4, per_layer=3, lit=None):
    """Attention (layers, heads, 8, 8), diffuse but for some heads: {(layer, head): [cells]}."""
    attention = np.random.default_rng(1).random((layers, per_layer, 8, 8)) * 1e-4
    for head, cells in (lit or {}).items():
        attention[head] = blobs(*cells, value=0.8 / len(cells))
    return attention


ONE, TWO = [(3, 3)], [(1, 1), (6, 6)]


def test_the_first_two_layers_never_localize():
    lit = {(0, 0): ONE, (1, 1): ONE, (2, 2): TWO, (3, 1): TWO}
    criteria = analyze.Criteria(top_k=2)
    assert set(analyze.greedy(criteria.measure(heads(lit=lit)), criteria)) == {(2, 2), (3, 1)}
    with pytest.raises(ValueError, match="there are 2 layers"):
        criteria.attentive(np.ones((2, 3)))


def test_the_most_compact_head_comes_first_and_ties_go_to_more_attention():
    attention = heads(lit={(2, 0): TWO, (3, 0): ONE, (3, 2): ONE})
    attention[3, 2] *= 1.1
    criteria = analyze.Criteria(top_k=3)
    assert analyze.greedy(criteria.measure(attention), criteria) == [(3, 2), (3, 0), (2, 0)]


def test_where_no_head_passes_those_with_most_attention_stand_in():
    attention = np.full((4, 3, 8, 8), 0.001)
    attention[2, 1] = 0.01
    criteria = analyze.Criteria(top_k=1)
    assert analyze.greedy(criteria.measure(attention), criteria) == [(2, 1)]


def test_min_keep_lowers_the_threshold():
    sums = np.zeros((4, 3))
    sums[2, 0], sums[3, 1], sums[3, 2] = 1, 0.5, 0.4
    kept = lambda count: int(analyze.Criteria(min_keep=count).attentive(sums).sum())  # noqa: E731
    assert kept(1) <= kept(6) == 6
    with pytest.raises(ValueError, match="min_keep is at least 1, not 0"):
        analyze.Criteria(min_keep=0)


def test_the_fixed_heads_are_those_that_count_most_often():
    criteria = analyze.Criteria(top_k=1, count_k=1)
    often, once = heads(lit={(2, 1): ONE, (3, 0): TWO}), heads(lit={(2, 1): TWO, (3, 0): ONE})
    samples = [criteria.measure(attention) for attention in (often, once, often)]
    assert analyze.counts(samples, criteria)[2, 1] == 2
    assert analyze.counts(samples, criteria)[3, 0] == 1
    assert analyze.frequent(samples, criteria) == [(2, 1)]


def test_halves_agree_where_other_images_have_the_same_heads():
    few = analyze.Criteria(top_k=3, count_k=3)
    one, other = (few.measure(heads(lit={head: ONE})) for head in ((2, 1), (3, 0)))
    assert analyze.frequent([one], few) == [(2, 1)]  # fewer than top_k
    assert analyze.halves_overlap([one] * 6, few, range(6)) == 1
    assert analyze.halves_overlap([one, one, other], few, list("aab")) == 0  # samples of an image stay in one half
    with pytest.raises(ValueError, match="samples of 1 images cannot be halved"):
        analyze.halves_overlap([one, one], few, list("aa"))


def test_manual_heads_must_pass_and_else_it_is_said():
    criteria = analyze.Criteria(top_k=1)
    measures = criteria.measure(heads(lit={(2, 1): ONE, (3, 0): TWO}))
    assert analyze.selected(measures, criteria, "fixed", [(3, 0), (3, 2)]) == ([(3, 0)], None)
    found, note = analyze.selected(measures, criteria, "fixed", [(3, 2)])
    assert found == [(2, 1)]
    assert "L3H2" in note
    assert "no localization heads are known" in analyze.selected(measures, criteria, "fixed")[1]
    assert len(analyze.selected(measures, criteria, "all")[0]) == 12
    with pytest.raises(ValueError, match="L4H0 does not exist: this model has layers 0 to 3, each with heads 0 to 2"):
        analyze.selected(measures, criteria, "fixed", [(4, 0)])


def test_heads_have_names():
    assert analyze.parse_heads("L14H24, l14h13") == [(14, 24), (14, 13)]
    assert analyze.head_name((14, 24)) == "L14H24"
    for text in ("14,24", "L1H1,L1H1", ""):
        with pytest.raises(ValueError, match="head"):
            analyze.parse_heads(text)


def test_attention_that_is_not_finite_is_an_error():
    attention = heads()
    attention[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 768"):
        analyze.Criteria().measure(attention)


# ---------------------------------------------------------------------------------------------------------- the boxes
def test_smoothing_has_a_kernel_of_seven_and_keeps_the_sum():
    smooth = analyze.smoothed(blobs((8, 8), shape=(17, 17)))
    rows, columns = np.nonzero(smooth)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 11, 5, 11)
    assert smooth.sum() == pytest.approx(1)
    maps = np.random.default_rng(0).random((3, 5, 9))
    assert np.allclose(analyze.heads_map(maps), analyze.smoothed(maps.sum(0)))  # the sum of the smoothed, any order


def test_the_box_is_that_of_the_largest_component_alone():
    mask = blobs((0, 0), (3, 3), (3, 4), (4, 4), (7, 7)) > 0
    assert bbox.hull_box(mask) == (3, 3, 5, 5)
    assert bbox.box_in_image(mask, (0, 0, 160, 80), (160, 80)) == [60, 30, 100, 50]
    assert bbox.box_in_image(mask, (-80, 0, 240, 80), (160, 80)) == [40, 30, 120, 50]  # a map that reaches beyond
    assert bbox.box_in_image(np.zeros((4, 4), dtype=bool), (0, 0, 8, 8), (8, 8)) is None


def test_the_hull_goes_around_its_cells():
    hull = bbox.convex_hull(blobs((1, 1), (1, 2), (2, 1)) > 0)
    assert {tuple(corner) for corner in hull.tolist()} == {(1, 1), (3, 1), (3, 2), (2, 3), (1, 3)}


def test_a_mask_at_the_images_resolution_lies_on_its_region():
    mask = blobs((0, 0), (1, 2), shape=(2, 4)) > 0
    shown = bbox.mask_in_image(mask, (10, 5, 50, 25), (60, 30))
    wanted = np.zeros((30, 60), dtype=bool)
    wanted[5:15, 10:20] = wanted[15:25, 30:40] = True
    assert np.array_equal(shown, wanted)


@pytest.mark.parametrize("region", [(0, 0, 100, 60), (20, 0, 80, 60), (0, -20, 100, 80)])
def test_a_planted_blob_is_found_where_it_is(region):
    attention = heads(lit={(2, 1): [(5, 2), (5, 3), (6, 2), (6, 3)]})
    found = bbox.ground(attention, region, (100, 60), Logic(top_k=1))
    left, top, right, bottom = region
    middle = left + (right - left) * 3 / 8, min(top + (bottom - top) * 6 / 8, 60)
    assert found.heads == [(2, 1)]
    assert evaluate_boxes.inside(middle, found.box)
    assert evaluate_boxes.inside(found.peak, found.box)
    assert found.shown.shape == (60, 100)
    assert found.shown[min(int(middle[1]), 59), int(middle[0])]


def test_what_pads_an_image_is_no_part_of_the_box():
    padding, region, image_size = [(0, column) for column in range(8)], (0, -30, 80, 50), (80, 50)  # cells of 10 x 10
    attention = heads(lit={(2, 1): [*padding, (5, 3), (5, 4), (6, 3), (6, 4)]})
    found = bbox.ground(attention, region, image_size, Logic(top_k=1))
    assert evaluate_boxes.inside((40, 30), found.box)
    assert 30 < found.peak[0] < 50
    assert 20 < found.peak[1] < 40
    assert "there is no box" not in found.note
    only_padding = bbox.ground(heads(lit={(2, 1): padding}), region, image_size, Logic(top_k=1))
    assert only_padding.box is None
    assert "there is no box" in only_padding.note
    assert 0 <= only_padding.peak[1] <= 50


# -------------------------------------------------------------------------------------------------------- attention
def plain_heads(kind, model, processor, image, prompt, said=()):
    """[L, H, 1, V]: every head's attention of the last token, by an eager forward of the processor's own inputs."""

    class Said(PLAIN_KINDS[kind]):
        def prepare(self, images, text):
            inputs = super().prepare(images, text)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if name in inputs:
                    more = [said] if name == "input_ids" else [[name == "attention_mask"] * len(said)]
                    values = inputs[name].new_tensor(more).reshape(1, -1)
                    inputs[name] = torch.cat([inputs[name], values], 1)
            return inputs

    plain = Said(model, processor, image, prompt)
    layers = range(model.config.get_text_config().num_hidden_layers)
    rows = [plain.st(plain.probs, layer).detach() for layer in layers]
    if kind == "blip":
        through = plain.probs[plain.cross()][0].float().mean(0)[:, 1:].detach()
        rows = [row @ through for row in rows]
    else:
        rows = [torch.stack([plain.grid(head).flatten() for head in row]) for row in rows]
    return torch.stack(rows)[:, :, None].numpy()


@pytest.fixture(scope="module", params=KINDS)
def collected(request):
    """(kind, collector of a small model of that kind with referseg prompts)."""
    collector = Collector(Model(family=request.param, name=request.param))
    collector.__dict__ |= {"loaded": KINDS[request.param](layers=3), "made_with": {}}
    return request.param, collector


def test_two_samples_in_one_process_differ_and_equal_the_plain_computation(collected):
    kind, collector = collected
    found = []
    for seed, query in ((0, "the red sign"), (1, "a blue one, left"), (1, "the red sign")):
        image = photo(seed=seed)
        attn, meta = collector.collect(collector.session_of(image), "x.png", query)
        wanted = plain_heads(kind, *collector.loaded, image, meta["prompt"])
        assert attn.shape == wanted.shape == (3, 4, 1, meta["vis_len"])
        assert np.abs(attn - wanted).max() <= 1e-5 * wanted.max()
        found.append(attn)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[one] - found[other]).max() > 1e-3 * found[one].max()


@pytest.mark.parametrize("mode", ConvMode)
def test_the_first_generated_token_is_read(collected, monkeypatch, mode):
    kind, _ = collected
    settings = Model(family=kind, name=kind, use_generate=True, max_new_tokens=3, conv_mode=mode)
    collector = Collector(settings)
    collector.__dict__ |= {"loaded": collected[1].loaded, "made_with": {}}
    image = photo()
    session = collector.session_of(image)
    attn, meta = collector.collect(session, "x.png", "the red sign")
    tokens, _ = collector.generate(session, meta["prompt"])
    assert tokens
    wanted = plain_heads(kind, *collector.loaded, image, meta["prompt"], tokens[:1])
    assert np.abs(attn - wanted).max() <= 1e-5 * wanted.max()
    # It may end at once: then the query's last token is read.
    monkeypatch.setattr("vicrop.localization.collector.stock_generate", lambda *_, **__: [])
    silent, meta = collector.collect(session, "x.png", "the red sign")
    assert np.abs(silent - plain_heads(kind, *collector.loaded, image, meta["prompt"])).max() <= 1e-5 * silent.max()
    assert meta["generated_text"] == ""


def test_sampling_and_beams_are_transformers_own(collected):
    kind, collector = collected
    session = collector.session_of(photo())
    phrase = session.adapter.phrase("the red sign")
    greedy = stock_generate(session, phrase, max_new_tokens=4, do_sample=False, num_beams=1)
    torch.manual_seed(3)
    other = stock_generate(session, phrase, max_new_tokens=4, do_sample=True, num_beams=2)
    assert len(greedy) <= 4
    assert other != greedy


# ---------------------------------------------------------------------------------------------------------- the files
META = {"patch_size": [2, 3], "query": "é", "image_file": "a.png"}


@pytest.mark.parametrize(("kind", "ending"), [("npz", ".npz"), ("pkl", ".pkl.gz")])
def test_attention_is_read_as_it_was_written(tmp_path, caplog, kind, ending):
    attn = np.random.default_rng(0).random((2, 3, 1, 6)).astype(np.float32)
    for dtype in AttentionType:
        how = AttentionStorage(AttentionFormat[kind], dtype=dtype, keep_meta_pickle=True)
        path = storage.write_attention(tmp_path / "7", attn, META, how)
        assert path.name == f"7{ending}"
        found, meta = storage.read_attention(path)
        assert meta == META | {"attn_dtype": dtype.name}
        assert found.dtype == dtype.name
        assert np.array_equal(found, attn.astype(dtype.name))
    assert ("can run code" in caplog.text) == (kind == "pkl")
    assert {path.name for path in tmp_path.iterdir()} == {f"7{ending}", "7_meta.json", "7_meta.pkl"}


def test_a_broken_attention_file_is_named(tmp_path):
    for name in ("a.npz", "a.pkl.gz"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=f"{name} is no attention file"):
            storage.read_attention(tmp_path / name)
    np.savez(tmp_path / "b.npz", attn=np.array([{}], dtype=object), meta=np.array(json.dumps(META)))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        storage.read_attention(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", attn=np.zeros((2, 3, 1, 5)), meta=np.array(json.dumps(META)))
    with pytest.raises(ValueError, match=r"about \[L, H, 1, 6\]"):
        storage.read_attention(tmp_path / "c.npz")
    with pytest.raises(FileNotFoundError):
        storage.read_attention(tmp_path / "d.npz")
    with pytest.raises(ValueError, match=r"\.npz or \.pkl\.gz"):
        storage.read_attention(tmp_path / "d.png")


def test_different_ids_have_different_files():
    ids = ["a/b", "a_b", "a%2Fb", "../x", "é", "a b", ".g", "%2Eg", "\udc80", "x" * 300, "x" * 299, "\u8a9e" * 90]
    names = [storage.safe_id(key) for key in ids]
    assert len(set(names)) == len(ids)
    assert not any("/" in name or name.startswith(".") for name in names)
    assert max(map(len, names)) <= storage.NAME_BYTES


# --------------------------------------------------------------------------------------------------------- the stages
EXAMPLES = ROOT / "localization" / "examples"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `python -m localization.pipeline model=llava_tiny ...` in this process; results go to out/llava_tiny."""
    monkeypatch.setattr("vicrop.localization.sample.viz.PANEL", 1.0)

    def run(*arguments):
        output = f"data.output_dir={tmp_path / 'out'}"
        monkeypatch.setattr(sys, "argv", ["localization.pipeline", "model=llava_tiny", output, *arguments])
        pipeline.main()
        return tmp_path / "out" / "llava_tiny"

    return run


QUERIES = ['the "red" sign', '"7" on the sign', "'tis a bird", "it's", "a, b", "[x]", "{a: 1}", "k=v", "100 %", "null ",
           r"a\b", "end\\", r"a\"b", "costs ${x}", r"a\${x}", "${oc.env:HOME}", "жёлтый"]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_arrives_as_it_was_typed(query):
    with initialize_config_dir(str(ROOT / "vicrop" / "localization" / "conf"), version_base="1.3"):
        assert compose("config", [pipeline.as_typed(f"data.query={query}")]).data.query == query


def test_what_is_quoted_for_hydra_is_its_own():
    for argument in ("data.query='a, b'", 'data.query="a, b"', "data.query=null", "logic.top_k=3"):
        assert pipeline.as_typed(argument) == argument


def test_one_picture_through_all_stages(command, capsys):
    image = EXAMPLES / "tall.jpg"
    query = 'the yellow sign, isn\'t it ("7")?'
    folder = command("stage=pipeline", f"data.image_file={image}", f"data.query={query}")
    (stem,) = {path.name.removesuffix("_bbox.json") for path in folder.glob("*_bbox.json")}
    endings = (".npz", "_analysis.json", "_bbox.json", "_heads.png", "_mask.png", "_meta.json", "_topK.png")
    assert {path.name for path in folder.iterdir()} == {stem + ending for ending in endings}
    box = json.loads((folder / f"{stem}_bbox.json").read_text())
    assert evaluate_boxes.inside(box["peak"], (159, 257, 205, 304))
    assert box["image_size"] == [466, 829]
    with Image.open(folder / f"{stem}_mask.png") as mask:
        assert mask.size == (466, 829)
        assert set(np.unique(mask)) == {0, 255}
    meta = json.loads((folder / f"{stem}_meta.json").read_text())
    assert (meta["query"], meta["vis_len"], meta["patch_size"], meta["num_heads"]) == (query, 196, 14, 8)
    ranked = json.loads((folder / f"{stem}_analysis.json").read_text())["ranked"]
    assert len(ranked) == 48
    attention = folder / f"{stem}.npz"
    for ending in ("_analysis.json", "_topK.png"):
        (folder / (stem + ending)).unlink()
    command("stage=analyze", f"data.attention_file={attention}")
    assert "<- chosen" in capsys.readouterr().out
    assert json.loads((folder / f"{stem}_analysis.json").read_text())["ranked"] == ranked
    command("stage=visualize", f"data.attention_file={attention}")
    assert (folder / f"{stem}_topK.png").is_file()
    assert json.loads((folder / f"{stem}_bbox.json").read_text()) == box
    # What is there is always about the same heads, and about the attention that is there.
    command("stage=analyze", f"data.attention_file={attention}", "logic.selection=all")
    kept = {path.name.removeprefix(stem): path for path in folder.iterdir()}
    assert set(kept) == {".npz", "_meta.json", "_analysis.json", "_bbox.json", "_mask.png"}
    chosen = [json.loads(kept[ending].read_text())["heads"] for ending in ("_analysis.json", "_bbox.json")]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 48
    command("stage=collect", f"data.image_file={image}", f"data.query={query}", "storage.attention.format=pkl")
    assert {path.name.removeprefix(stem) for path in folder.iterdir()} == {".pkl.gz", "_meta.json"}


def test_a_long_query_in_any_script_has_its_files(command):
    folder = command("stage=collect", "data.image_file=localization/examples/tall.jpg", f"data.query={'жёлтый ' * 12}")
    (path,) = folder.glob("*_meta.json")
    assert json.loads(path.read_text())["query"] == "жёлтый " * 12


def some_lines(path, *more):
    lines = (EXAMPLES / "examples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["image_path"] = str(EXAMPLES / row["image_path"])
    path.write_text("\n".join([json.dumps(row) for row in rows] + list(more)) + "\n")
    return [row["id"] for row in rows]


def test_a_batch_goes_on_and_one_bad_line_does_not_stop_it(command, tmp_path, monkeypatch, capsys):
    bad = ['{"id": "x"}', "{nothing", '{"id": "y", "prompt": "the sign", "image_path": "gone.jpg"}']
    bad += ['{"id": "z", "prompt": "the sign", "image_path": "data:%s"}' % ("x" * 5000)]
    bad += ['{"id": "\\udc80", "prompt": "the sign", "image_path": "gone.jpg"}']
    lines = tmp_path / "lines.jsonl"
    ids = some_lines(lines, *bad)
    with lines.open("ab") as file:
        file.write(b'{"id": "caf\xe9"}\n')
    batch = ("stage=batch", f"data.data_file={lines}", "data.process_all=true")
    folder = command(*batch)
    assert {path.name for path in folder.glob("*_bbox.json")} == {f"{key}_bbox.json" for key in ids}
    said = capsys.readouterr().err
    assert all(part in said for part in ("line 13: prompt is a text", "line 14", "y: no image file at", "line 18: "))
    assert "line 16: [Errno" in said
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*_bbox.json")}
    (folder / f"{ids[3]}_bbox.json").unlink()
    (folder / f"{ids[5]}.npz").unlink()
    content = {path: path.read_text() for path in before if path.exists()}
    command(*batch)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert sorted(changed) == sorted(f"{ids[number]}_bbox.json" for number in (3, 5))
    assert all(path.read_text() == text for path, text in content.items())
    # What is damaged is made again, too, and pictures that were not asked for before.
    (folder / f"{ids[1]}_meta.json").write_text("")
    (folder / f"{ids[2]}_bbox.json").write_text("{")
    (folder / f"{ids[4]}_mask.png").unlink()
    for ending in (".npz", "_bbox.json"):
        (folder / f"{ids[6]}{ending}").write_bytes(b"PK")
    command(*batch, "data.visualize_batch=true")
    assert f"{ids[6]}.npz is no attention file" in capsys.readouterr().err
    for key in ids:
        assert json.loads((folder / f"{key}_bbox.json").read_text())["bbox"]
        assert all((folder / f"{key}{ending}").is_file() for ending in ("_mask.png", "_topK.png"))
        storage.read_attention(folder / f"{key}.npz")
    # However the file is named, it is the same: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    command("stage=batch", "data.data_file=lines.jsonl", "data.process_all=true")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # With other heads, stored attention is only analyzed: no model is loaded.
    some_lines(lines)
    monkeypatch.setattr("vicrop.localization.collector.load_model", None)
    command(*batch, "logic.manual_heads=[{layer:2,head:6}]")
    assert json.loads((folder / f"{ids[0]}_bbox.json").read_text())["heads"] == ["L2H6"]
    assert not list(folder.glob("*_topK.png"))  # they showed others


@pytest.mark.parametrize("ids", [(1, "1"), ("a", "a"), (7, 7)])
def test_a_file_in_which_an_id_comes_twice_is_refused_at_once(command, tmp_path, monkeypatch, ids):
    rows = [{"id": key, "prompt": "the sign", "image_path": str(EXAMPLES / "square.jpg")} for key in ("x", *ids)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("vicrop.localization.collector.load_model", None)
    with pytest.raises(SystemExit, match=r"lines.jsonl: ids must differ.* \(lines 2 and 3\)"):
        command("stage=batch", f"data.data_file={tmp_path / 'lines.jsonl'}", "data.process_all=true")


QUERIES = ["the tag with $5 # $6", "$", "$$", "$x_$ and \\frac{", "a sign that says 100% of $10 & $20_a^b " * 6]


def test_a_query_with_dollars_is_a_title_like_any_other(command, tmp_path):
    rows = [
        {"id": key, "prompt": query, "image_path": str(EXAMPLES / "square.jpg")} for key, query in enumerate(QUERIES)
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = (f"data.data_file={tmp_path / 'lines.jsonl'}", "data.process_all=true", "data.visualize_batch=true")
    folder = command("stage=batch", *batch)
    assert sorted(path.name for path in folder.glob("*_topK.png")) == [f"{key}_topK.png" for key in range(len(QUERIES))]
    query = 'data.query="costs $5 # or $6_"'
    folder = command("stage=pipeline", f"data.image_file={EXAMPLES / 'square.jpg'}", query)
    assert list(folder.glob("square-costs*_heads.png"))


def test_a_title_is_wrapped_into_lines_of_a_panels_width():
    assert viz.wrapped("the sign with a 7", 9) == "the sign\nwith a 7"
    assert viz.wrapped("layer 3, head 1\nentropy 0.5", 40) == "layer 3, head 1\nentropy 0.5"
    assert max(map(len, viz.wrapped("x" * 90, 20).split("\n"))) == 20


def test_a_large_picture_is_opened_once_it_is_allowed(command, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    ask = ("stage=collect", f"data.image_file={EXAMPLES / 'square.jpg'}", "data.query=the sign")
    for limit in ("", "data.max_image_pixels=2000"):
        with pytest.raises(SystemExit, match=r"square.jpg is refused.*data.max_image_pixels\) allows up to 178956970"):
            command(*ask, *filter(None, [limit]))
    with pytest.raises(SystemExit, match="max_image_pixels must be 1 to 178956970, got 178956971"):
        command(*ask, "data.max_image_pixels=178956971")
    assert list(command(*ask, "data.max_image_pixels=178956970").glob("*.npz"))


def test_a_batch_that_is_interrupted_goes_on(command, tmp_path, monkeypatch):
    lines, wrote = tmp_path / "lines.jsonl", []
    ids = some_lines(lines)
    batch = ("stage=batch", f"data.data_file={lines}", "data.process_all=true")
    write = storage.write_attention

    def interrupted(stem, *rest):
        wrote.append(stem.name)
        if len(wrote) == 6:
            raise KeyboardInterrupt
        return write(stem, *rest)

    monkeypatch.setattr(storage, "write_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*batch)
    folder = command(*batch)
    assert len(wrote) == len(ids) + 1
    assert len(list(folder.glob("*_bbox.json"))) == len(ids)
    assert not list(folder.glob(".*"))


def test_heads_are_found_in_a_batch_and_used(command, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    some_lines(lines)
    batch = ("stage=batch", f"data.data_file={lines}")
    folder = command(*batch, "data.start_index=2", "data.end_index=10", "logic.selection=greedy")
    assert len(list(folder.glob("*.npz"))) == 8
    command("stage=batch_analyze", f"data.batch_attention_dir={folder}")
    printed = capsys.readouterr().out
    report = json.loads((folder / "localization_heads.json").read_text())
    assert report["samples"] == 8
    assert (folder / "localization_heads.png").is_file()
    (line,) = [line for line in printed.splitlines() if "logic.manual_heads" in line]
    manual = line.split("'")[1]
    command(*batch, "data.start_index=2", "data.end_index=10", manual)
    chosen = {head for path in folder.glob("*_bbox.json") for head in json.loads(path.read_text())["heads"]}
    assert chosen <= set(report["heads"].split(","))
    assert vicrop.heads_of("llava_tiny", given=folder / "localization_heads.json") == [
        (head["layer"], head["head"]) for head in report["manual_heads"]
    ]


def test_heads_are_not_found_in_attention_that_was_read_in_several_ways(command):
    command("stage=batch", "data.end_index=2")
    folder = command("stage=batch", "data.start_index=2", "data.end_index=4", "model.conv_mode=referseg")
    with pytest.raises(SystemExit, match="one model, read in one way") as stopped:
        command("stage=batch_analyze", f"data.batch_attention_dir={folder}")
    assert "referseg" in str(stopped.value.code)


def test_single_pictures_are_no_samples_of_a_batch(command, capsys):
    command("stage=collect")
    folder = command("stage=batch", "data.end_index=3")
    command("stage=batch_analyze", f"data.batch_attention_dir={folder}")
    assert json.loads((folder / "localization_heads.json").read_text())["samples"] == 3
    assert "1 single pictures, which are no samples" in capsys.readouterr().err


def test_stored_attention_is_analyzed_with_the_heads_of_its_own_model(command, monkeypatch):
    folder = command("stage=collect")
    (attention,) = folder.glob("*.npz")
    heads = []
    for model in ("llava_tiny", "blip_tiny"):
        command(f"model={model}", "stage=analyze", f"data.attention_file={attention}")
        (path,) = folder.glob("*_analysis.json")
        heads.append(json.loads(path.read_text())["heads"])
    assert heads[0] == heads[1]
    assert set(heads[0]) <= set(info.MODELS["llava_tiny"]["loc_heads"].split(","))


def test_a_photo_that_a_camera_has_turned_is_grounded_upright(command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(EXAMPLES / "tall.jpg") as tall:
        tall.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    boxes = []
    for image in (EXAMPLES / "tall.jpg", tmp_path / "turned.jpg"):
        folder = command("stage=pipeline", f"data.image_file={image}", "data.query=the yellow sign")
        (path,) = folder.glob(f"{image.stem}-*_bbox.json")
        boxes.append(json.loads(path.read_text()))
    assert boxes[0]["image_size"] == boxes[1]["image_size"] == [466, 829]
    assert boxes[0]["bbox"] == pytest.approx(boxes[1]["bbox"], abs=70)  # a cell or two: it was saved as JPEG twice


def test_samples_of_equal_names_do_not_overwrite_each_other(command, tmp_path):
    (tmp_path / "other").mkdir()
    Image.open(EXAMPLES / "wide.jpg").save(tmp_path / "other" / "square.jpg")
    for image in (EXAMPLES / "square.jpg", tmp_path / "other" / "square.jpg", EXAMPLES / "square.jpg"):
        folder = command("stage=collect", f"data.image_file={image}", "data.query=the blue sign")
    metas = [json.loads(path.read_text()) for path in folder.glob("*_meta.json")]
    assert {meta["image_file"] for meta in metas} == {str(EXAMPLES / "square.jpg"), str(tmp_path / "other/square.jpg")}
    assert len(list(folder.glob("*.npz"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=collect", "data.query=null"], "data.query are needed"),
        (["stage=collect", "data.image_file=localization/examples/tall.jpg"], "data.query are needed"),
        (["stage=collect", "data.query=the red sign"], "data.query are needed"),
        (["stage=batch", "data.start_index=400"], "has 12 lines, counted from 0, and none from 400 up to the end"),
        (["stage=collect", "data.image_file=gone.jpg"], "gone.jpg"),
        (["stage=analyze"], "data.attention_file is needed"),
        (["stage=batch", "data.data_file=gone.jsonl"], "no file gone.jsonl"),
        (["stage=batch"], "data.process_all=true"),
        (["stage=batch", "data.process_all=true", "data.end_index=2"], "is about all lines: leave it out, or"),
        (["stage=batch_analyze"], "data.batch_attention_dir is needed"),
        (["model.use_flash_attn=true"], "use_flash_attn must be false"),
        (["model.device=tpu"], "'tpu' cannot be used"),
        (["model.look.max_pixels=5"], "has no option 'max_pixels'"),
        (["logic.manual_heads=[{layer:9,head:0}]"], "L9H0 does not exist"),
        (["logic.selection=greedy", "logic.manual_heads=[{layer:2,head:0}]"], "manual_heads are fixed heads"),
        (["logic.top_k=0"], "top_k is at least 1"),
    ],
)
def test_a_wrong_setting_is_a_sentence(command, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert message in str(stopped.value)


@pytest.mark.parametrize("argument", ["model.nmae=x", "logic.selection=best", "logic.top_k=many", "stage=all"])
def test_an_unknown_key_or_value_is_a_sentence(command, argument):
    with pytest.raises(SystemExit) as stopped:
        command(argument)
    assert argument.partition("=")[0].rpartition(".")[2] in stopped.value.code
    assert len(stopped.value.code.splitlines()) == 1


def test_other_names_of_a_checkpoint():
    assert Collector(Model(family="llava", name="llava_tiny")).model_id == "vicrop/embedded/llava"
    assert vicrop.heads_of("llava", "vicrop/embedded/llava") is None
    with pytest.raises(ValueError, match="blip_tiny is none of model.family llava"):
        Collector(Model(family="llava", name="blip_tiny"))
    assert Collector(Model(family="llava", name="liuhaotian/llava-v1.5-7b")).model_id == "llava-hf/llava-1.5-7b-hf"
    assert vicrop.heads_of("llava", "llava-hf/llava-1.5-7b-hf") == [(14, 24), (14, 13)]
    assert vicrop.heads_of("llava", "llava-hf/llava-1.5-13b-hf") is None  # another checkpoint has other heads


def test_a_file_of_heads_belongs_to_a_checkpoint_however_it_is_named(tmp_path, recwarn):
    path = tmp_path / "localization_heads.json"
    for name in ("liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf", "llava"):
        path.write_text(json.dumps({"heads": "L14H24", "model": name}))
        assert vicrop.heads_of("llava", given=path) == [(14, 24)]
    assert not recwarn
    with pytest.warns(UserWarning, match="another model has other heads"):
        vicrop.heads_of("llava_tiny", given=path)


# ------------------------------------------------------------------------------------------------------------- scores
@pytest.fixture
def predictions(tmp_path):
    """(ground truth, folder of predictions): exact, half, missing and degenerate."""
    rows = [
        {"question_id": key, "bbox": [10, 10, 20, 20], "width": 100, "height": 100, "image_path": f"{key}.png"}
        for key in ("exact", "half", "none/there", "flat")
    ]
    (tmp_path / "gt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for key, box, peak in (("exact", [10, 10, 30, 30], [20, 20]), ("half", [10, 10, 30, 20], [40, 40]),
                           ("flat", [10, 10, 10, 30], None)):  # fmt: skip
        (tmp_path / f"{key}_bbox.json").write_text(json.dumps({"bbox": box, "peak": peak}))
    return tmp_path / "gt.jsonl", tmp_path


def evaluated(capsys, *arguments):
    evaluate_boxes.main([*map(str, arguments), "--id-field", "question_id", "--format", "json"])
    return json.loads(capsys.readouterr().out)


def test_boxes_are_judged_by_hand(predictions, capsys):
    truth, root = predictions
    report = evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root, "--baseline", root, "center")
    assert report["samples"] == 4
    assert report["mean_iou"] == pytest.approx(1.5 / 4)
    assert report["median_iou"] == pytest.approx(0.25)  # the mean of the middle two: 0 and 0.5
    assert [report[f"acc@{share}"] for share in (0.25, 0.5, 0.75)] == [0.5, 0.5, 0.25]
    assert report["pointing"] == 0.25
    assert report["wrong"] == {"none/there": "missing", "flat": "degenerate"}
    assert report["baselines"][str(root)]["difference"]["mean_iou"] == [0, 0, 0]
    assert report["baselines"]["center"]["mean_iou"] == pytest.approx(25 / (2500 + 400 - 25))
    evaluate_boxes.main(["--dataset-jsonl", str(truth), "--pred-root", str(root), "--id-field", "question_id"])
    printed = capsys.readouterr().out
    assert "2 predictions count as IoU 0: none/there (missing), flat (degenerate)" in printed


def test_a_broken_prediction_is_listed_and_counts_as_none(predictions, capsys):
    truth, root = predictions
    (root / "half_bbox.json").write_text('{"bbox": [10, 10, 30, 20], "peak": {"x": 1}}')  # no point, but a box
    for text in ('{"bbox": [10, 1', "[10, 10, 30, 30]"):
        (root / "exact_bbox.json").write_text(text)
        report = evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root)
        assert report["mean_iou"] == pytest.approx(0.5 / 4)
        assert report["wrong"]["exact"] == "broken"


@pytest.mark.parametrize("size", [[200, 200], [100, 101], [1000, 1000]])
def test_a_prediction_about_an_image_of_another_size_is_listed_and_counts_as_none(predictions, capsys, size):
    truth, root = predictions
    exact, half = ({"bbox": [10, 10, 30, y], "peak": [20, 15]} for y in (30, 20))
    (root / "exact_bbox.json").write_text(json.dumps(exact | {"image_size": size}))
    (root / "half_bbox.json").write_text(json.dumps(half | {"image_size": [100, 100]}))
    report = evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root)
    assert report["mean_iou"] == pytest.approx(0.5 / 4)
    assert report["wrong"]["exact"] == f"of an image of {size[0]} x {size[1]}, not 100 x 100"
    assert "half" not in report["wrong"]


@pytest.mark.parametrize("box", [[10, 10, 130, 30], [10, 10, 30, 102], [-2, 10, 30, 30], [10, -5, 30, 30]])
def test_a_predicted_box_that_leaves_its_image_is_listed_and_counts_as_none(predictions, capsys, box):
    truth, root = predictions
    (root / "exact_bbox.json").write_text(json.dumps({"bbox": box, "image_size": [100, 100]}))
    (root / "half_bbox.json").write_text(json.dumps({"bbox": [10, 10, 30, 100.9], "image_size": [100, 100]}))
    report = evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root)
    assert report["wrong"]["exact"] == "outside of its image of 100 x 100"
    assert "half" not in report["wrong"]  # annotators and programs round


def test_pointing_is_only_judged_where_peaks_were_saved(predictions, capsys):
    truth, root = predictions
    for path in root.glob("*_bbox.json"):
        path.write_text(json.dumps({"bbox": json.loads(path.read_text())["bbox"]}))
    assert "pointing" not in evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root)


def test_only_large_boxes(predictions, capsys):
    truth, root = predictions
    assert evaluated(capsys, "--dataset-jsonl", truth, "--pred-root", root, "--min-area", 0.04)["samples"] == 4
    with pytest.raises(SystemExit, match=r"no box covers 0\.05"):
        evaluate_boxes.main(["--dataset-jsonl", str(truth), "--pred-root", str(root), "--min-area", "0.05",
                             "--id-field", "question_id"])  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "bbox": [1, 2, 3, 4]}', "no 'question_id' among id, bbox"),
        ("[1, 2]", "record 1 is no object but 1"),
        ('{"question_id": 1, "bbox": [1, 2, 0, 4]}', r"bbox is \[x, y, width, height\]"),
        ('{"question_id": 1, "bbox": [1, 2, 3, 4]}\n{"question_id": 1, "bbox": [1, 2, 3, 4]}', "comes twice"),
        (
            '{"question_id": 1, "bbox": [1, 2, 3, 4]}\n{"question_id": "1", "bbox": [1, 2, 3, 4]}',
            r"1 and '1' \(records 1",
        ),
        ('{"question_id": true, "bbox": [1, 2, 3, 4]}', "question_id|id is a text or a whole number, not True"),
        (
            '{"question_id": 1, "bbox": [40, 30, 60, 50], "width": 90, "height": 90}',
            "reaches beyond its image of 90 x 90",
        ),
        ('{"question_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4], "width": 90, "height": 90}', "a side under one pixel"),
        ('{"question_id": 1, "bbox": [100, 500, 300, 300], "width": 640, "height": 480}', "reaches beyond its image"),
        (
            '{"question_id": 1, "bbox": [1, 2, 3, 4], "width": "90", "height": 90}',
            "width is a number of pixels, not '90'",
        ),
        ('{"question_id": 1, "bbox": [1, 2, 3, 4], "width": 0, "height": 90}', "width is a number of pixels, not 0"),
    ],
)
def test_a_wrong_ground_truth_is_named(tmp_path, line, message):
    (tmp_path / "gt.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        evaluate_boxes.main(["--dataset-jsonl", str(tmp_path / "gt.jsonl"), "--pred-root", str(tmp_path),
                             "--id-field", "question_id"])  # fmt: skip


MDETR = {
    "images": [{"id": 5, "caption": "the man left", "file_name": "COCO_train2014_000000000009.jpg", "width": 60,
                "height": 40}],
    "annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4]}],
}  # fmt: skip
MINIGPT = [{"img_id": "COCO_train2014_000000000009_0", "sents": "the man left", "bbox": [1, 2, 3, 4], "width": 60,
            "height": 40}]  # fmt: skip


@pytest.mark.parametrize("content", [MDETR, MINIGPT], ids=["mdetr", "minigpt"])
def test_refcoco_becomes_queries_and_ground_truth(tmp_path, content, capsys):
    (tmp_path / "images").mkdir()
    photo(60, 40).save(tmp_path / "images" / "COCO_train2014_000000000009.jpg")
    (tmp_path / "refcoco_val.json").write_text(json.dumps(content))
    refcoco.main([str(tmp_path / "refcoco_val.json"), "--images", str(tmp_path / "images"), "--out", str(tmp_path)])
    assert "1 phrases" in capsys.readouterr().out
    query = json.loads((tmp_path / "refcoco_val.jsonl").read_text())
    truth = json.loads((tmp_path / "refcoco_val_gt.jsonl").read_text())
    assert (query["prompt"], query["id"]) == ("the man left", truth["question_id"])
    assert (truth["bbox"], truth["width"]) == ([1, 2, 3, 4], 60)
    assert Image.open(query["image_path"]).size == (60, 40)


def test_another_file_than_refcoco_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[{}]")
    with pytest.raises(SystemExit, match="x.json: it is neither MDETR's"):
        refcoco.main([str(tmp_path / "x.json"), "--images", str(tmp_path), "--out", str(tmp_path)])


def test_equal_ids_of_mdetr_are_refused_whatever_their_type(tmp_path):
    images = [MDETR["images"][0] | {"id": key} for key in (5, "5")]
    boxes = [MDETR["annotations"][0] | {"image_id": key} for key in (5, "5")]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    with pytest.raises(SystemExit, match=r"comes twice: 5 and '5' \(records 0 and 1\)"):
        refcoco.main([str(tmp_path / "x.json"), "--images", str(tmp_path), "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bbox": None}, r"a box is \[x, y, width, height\] in pixels, not None"),
        ({"bbox": [1, 2, 0, 4]}, "bbox is"),
        ({"sents": None}, "the phrase is a text|not as expected"),
        ({"sents": " "}, "'1': prompt is a text that is not empty, not ' '"),
        ({"bbox": [30, 9, 55, 30]}, r"'1': bbox \[30, 9, 55, 30\] .* reaches beyond its image of 60 x 40"),
        ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "'1': bbox .* a side under one pixel"),
        ({"bbox": [100, 500, 800, 300]}, "'1': bbox .* reaches beyond"),
        ({"bbox": [1, 2, "3", 4]}, r"a box is \[x, y, width, height\] in pixels, not \[1, 2, '3', 4\]"),
        ({"bbox": [1, 2, True, 4]}, r"a box is \[x, y, width, height\]"),
        ({"width": "60"}, "'1': width is a number of pixels, not '60'"),
        ({"height": True}, "'1': height is a number of pixels, not True"),
        ({"img_id": 9}, "not as expected"),
    ],
)
def test_a_wrong_annotation_of_refcoco_is_named_and_nothing_is_written(tmp_path, change, says):
    (tmp_path / "x.json").write_text(json.dumps([MINIGPT[0], MINIGPT[0] | change]))
    with pytest.raises(SystemExit, match=says):
        refcoco.main([str(tmp_path / "x.json"), "--images", str(tmp_path), "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.jsonl"))
