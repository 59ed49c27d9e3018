"""The one door for checkpoints: what comes through is what it is called, else a sentence, and nothing is written."""

import functools
import json
import re
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
from builders import KINDS, photo
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from vicrop.attribution import weighted_attention
from vicrop.checkpoints import hub_config_file, load_model, reason, weights_of
from vicrop.crop import model_module, vicrop_qa
from vicrop.evaluation import command as run
from vicrop.findings import command as findings
from vicrop.localization import pipeline
from vicrop.localization.collector import stock_generate
from vicrop.models import instructblip as blip_methods
from vicrop.processors import place_token
from vicrop.session import ImageSession
from vicrop.tables import METHODS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8315520\n"
OTHERS = [(kind, other) for kind in KINDS for other in KINDS if other != kind]
TINY = {"llava": "vicrop/embedded/llava", "blip": "vicrop/embedded/blip", "qwen2_5": "vicrop/embedded/qwen2_5"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{family: folder with a small random checkpoint}; nobody changes them."""
    root = tmp_path_factory.mktemp("saved")
    for kind, build in KINDS.items():
        for part in build():
            part.save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def copied(saved, tmp_path):
    """(family) -> a copy of its checkpoint that may be spoilt."""
    return lambda kind: Path(shutil.copytree(saved[kind], tmp_path / "checkpoint"))


@pytest.fixture
def refused(tmp_path, capsys):
    """(family, checkpoint) -> the one sentence with which run.py refuses it, having written nothing."""

    def sentence(kind, checkpoint, *more):
        photo().save(tmp_path / "a.png")
        (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "question": "?", "image_path": "a.png"}]))
        out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
        common = ["--model", kind, "--model_id", checkpoint, "--device", "cpu", "--save_path", out]
        asked = ["--question_path", tmp_path / "data.json", "--image_path", tmp_path]
        with pytest.raises(SystemExit) as stopped:
            run.main([str(each) for each in [*common, *asked, *more]])
        said = str(stopped.value.code)
        assert sorted(tmp_path.rglob("*")) == before
        assert said.startswith("run.py: ")
        assert "\n" not in said
        assert "Traceback" not in capsys.readouterr().err
        return said.replace(str(checkpoint), "HERE")

    return sentence


def edit(path, **changes):
    """Change fields of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def reweigh(folder, change):
    """Replace the weights of a checkpoint by what `change` makes of {name: tensor}."""
    weights = folder / "model.safetensors"
    changed = change(load_file(weights))
    save_file({name: value.contiguous() for name, value in changed.items()}, weights, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def in_parts(folder, suffix=".safetensors"):
    """The weights of a checkpoint in two files and an index; returns their paths."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    parts = [folder / f"{stem}-0000{number}-of-00002{suffix}" for number in (1, 2)]
    names = [list(weights)[number::2] for number in (0, 1)]
    for part, own in zip(parts, names, strict=True):
        held = {name: weights[name].clone() for name in own}
        save_file(held, part, metadata={"format": "pt"}) if suffix == ".safetensors" else torch.save(held, part)
    index = {name: part.name for part, own in zip(parts, names, strict=True) for name in own}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return parts


def same_weights(folder, other, kind):
    """Do two checkpoints load as the same weights?"""
    one, two = (load_model(kind, each, "cpu")[0].state_dict() for each in (folder, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -------------------------------------------------------------------------------------------------------- the family
@pytest.mark.parametrize(("kind", "other"), OTHERS)
def test_a_checkpoint_of_another_family_is_sent_to_its_own(saved, refused, kind, other):
    family = model_module(other).MODEL_CLASS.config_class.model_type
    for checkpoint in filter(None, (saved[other], TINY.get(other))):
        said = refused(kind, checkpoint).replace(str(checkpoint), "HERE")
        assert said.startswith(f"run.py: HERE is a {family} checkpoint: use --model {other} ")
        assert f"model.family={other}" in said  # what it is called in localization


@pytest.mark.parametrize("family", ["bert", "mllama", "idefics2", "a-new-one"])
def test_a_family_that_the_toolkit_does_not_know_is_said_with_those_that_it_knows(copied, refused, family):
    folder = copied("llava")
    edit(folder / "config.json", model_type=family)
    said = refused("llava", folder)
    assert f"HERE is a {family} checkpoint: the toolkit knows " in said
    assert all(known in said for known in ("llava (llava)", "llava_next", "instructblip (blip)", "qwen2_5_vl"))


@pytest.mark.parametrize(
    "text", ["", "   \n", "{", "[]", '"llava"', "null", POINTER, '{"model_type": 3}', "{}", "\xff"]
)
@pytest.mark.parametrize("function", [load_model, weights_of])
def test_a_config_that_says_nothing_is_refused_by_whoever_reads_it_first(copied, text, function):
    folder = copied("llava")
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="checkpoint/config.json"):
        function("llava", folder)


PARTS = [(kind, part) for kind in KINDS for part in model_module(kind).MODEL_CLASS.config_class.sub_configs]


@pytest.mark.parametrize("given", [None, "null", "{}", "[1]", "3", '"llama"'])
@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_config_without_a_part_of_the_model_is_not_filled_in(copied, kind, part, given):
    path = copied(kind) / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != part}
    path.write_text(json.dumps(config if given is None else config | {part: json.loads(given)}))
    says = rf"/config.json has no {part}: it must be an object with fields, and is {re.escape(given or 'missing')}$"
    for function in (weights_of, load_model):
        with pytest.raises(ValueError, match=says):
            function(kind, path.parent)


def test_a_flat_config_of_qwen_is_as_good_as_one_in_parts(copied, saved):
    path = copied("qwen2_5") / "config.json"
    config = json.loads(path.read_text())
    own = config.pop("text_config")
    path.write_text(json.dumps({name: own[name] for name in own if name != "model_type"} | config))
    assert same_weights(path.parent, saved["qwen2_5"], "qwen2_5")


def test_a_part_of_the_model_may_name_few_sizes(copied, saved):
    path = copied("llava") / "config.json"
    edit(path, text_config={"model_type": "llama"})  # as official ones do, whose sizes are the default's
    assert weights_of("llava", path.parent) != weights_of("llava", saved["llava"])


def test_a_folder_without_a_config_is_not_taken_for_the_default_model(copied, refused, tmp_path):
    folder = copied("qwen2_5")
    (folder / "config.json").unlink()
    assert "HERE has no config.json" in refused("qwen2_5", folder)
    assert "HERE has no config.json" in refused("qwen2_5", folder, "--overwrite")
    (tmp_path / "empty").mkdir()
    assert "HERE has no config.json" in refused("blip", tmp_path / "empty")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_no_whole_checkpoint(copied, refused, with_config):
    folder = copied("llava")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}')
    if not with_config:
        (folder / "config.json").unlink()
    assert "merge it into its base model first" in refused("llava", folder)


def test_a_path_that_is_no_folder_is_said_without_asking_the_hub(copied, refused, tmp_path):
    assert "there is no folder HERE" in refused("llava", tmp_path / "gone")
    assert "there is no folder ./gone" in refused("llava", "./gone").replace("HERE", "./gone")
    assert "HERE is a file" in refused("llava", copied("llava") / "config.json")
    assert "HERE is no folder here" in refused("llava", "vicrop/embedded/lava")


def test_an_adapter_on_the_hub_is_no_whole_checkpoint_either(tmp_path):
    commit = "0123456789" * 4
    kept = tmp_path / "models--org--name" / "snapshots" / commit
    kept.mkdir(parents=True)
    (kept / "adapter_config.json").write_text("{}")
    (missing := tmp_path / "models--org--name" / ".no_exist" / commit).mkdir(parents=True)
    (missing / "config.json").touch()  # the hub has been asked for it
    with pytest.raises(ValueError, match="org/name is an adapter"):
        load_model("llava", "org/name", "cpu", revision=commit, cache_dir=tmp_path)


def test_a_checkpoint_of_the_hub_is_told_by_its_commit(saved, tmp_path):
    commit = "0123456789" * 4
    kept = tmp_path / "models--org--name"
    shutil.copytree(saved["llava"], kept / "snapshots" / commit)
    (kept / ".no_exist" / commit).mkdir(parents=True)
    (kept / ".no_exist" / commit / "adapter_config.json").touch()  # the hub has been asked for it
    assert weights_of("llava", "org/name", commit, tmp_path) == commit
    with pytest.raises(ValueError, match="org/name is a llava checkpoint: use --model llava "):
        weights_of("blip", "org/name", commit, tmp_path)


def test_the_family_is_that_of_the_revision_and_not_of_another_one(tmp_path, monkeypatch):
    kept = tmp_path / "models--org--name"
    commits = {kind: digit * 40 for kind, digit in (("llava", "1"), ("qwen3_vl", "2"))}
    for kind, commit in commits.items():
        (kept / "snapshots" / commit).mkdir(parents=True)
        (kept / "snapshots" / commit / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commits["llava"])
    monkeypatch.setattr("vicrop.checkpoints.hub_config_file", functools.partial(hub_config_file, local_files_only=True))

    def found(*source):
        return model_module(*source, cache_dir=tmp_path).__name__.rpartition(".")[2]

    assert found("org/name") == found("org/name", "org/name", commits["llava"]) == "llava"
    assert found("org/name", None, commits["qwen3_vl"]) == "merged_patches"
    assert found("org/name", "org/other", commits["qwen3_vl"]) == "llava"  # the revision is the other's
    assert found("gemma3", None, commits["qwen3_vl"]) == "squares"


# ------------------------------------------------------------------------------------------------------- the weights
PROJECTORS = {"blip": "language_projection", "qwen2_5": "merger.mlp"}
MISSING = {
    "projector": lambda kind: without(PROJECTORS.get(kind, "multi_modal_projector")),
    "head": lambda kind: without("lm_head"),
    "one layer": lambda kind: without(".layers.1."),
    "one tensor": lambda kind: without("layers.0.self_attn.v_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights_are_refused_by_name(copied, refused, kind, what):
    folder = copied(kind)
    before = len(load_file(folder / "model.safetensors"))
    reweigh(folder, MISSING[what](kind))
    count = before - len(load_file(folder / "model.safetensors"))
    said = refused(kind, folder)
    assert f"HERE lacks {count} of its model's weights: " in said
    names = {"projector": PROJECTORS.get(kind, "multi_modal_projector"), "head": "lm_head.weight",
             "one layer": ".1.", "one tensor": "layers.0.self_attn.v_proj.weight"}  # fmt: skip
    assert names[what] in said


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_all_weights_is_said(copied, refused, kind, prefix):
    folder = copied(kind)
    reweigh(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    assert f"begin with {prefix!r}: save it without that prefix" in refused(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_model_does_not_have_are_warned_about(copied, saved, kind):
    folder = copied(kind)
    reweigh(folder, lambda weights: weights | {f"extra.{number}": torch.ones(1) for number in range(5)})
    with pytest.warns(UserWarning, match=r"5 of the weights in .*: extra.0, extra.1, extra.2, and 2 more"):
        assert same_weights(folder, saved[kind], kind)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5"])
def test_a_head_that_is_tied_to_the_embeddings_need_not_be_in_the_files(copied, kind):
    folder = copied(kind)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", tie_word_embeddings=True,
         text_config=config["text_config"] | {"tie_word_embeddings": True})  # fmt: skip
    reweigh(folder, without("lm_head"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_model(kind, folder, "cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "part", "shape", "names"),
    [
        ("llava", "linear_1.bias", (65,), "linear_1.bias is 65 in its files and 64 by config.json"),
        ("blip", "language_projection.weight", (64, 33), "is 64 x 33 in its files and 64 x 32 by config.json"),
        ("qwen2_5", "layers.1.mlp.up_proj.weight", (97, 64), "is 97 x 64 in its files and 96 x 64 by config.json"),
        ("llava_next", "image_newline", (32,), "image_newline is 32 in its files and 64 by config.json"),
    ],
)
def test_weights_of_another_size_are_refused_with_both_sizes(copied, refused, kind, part, shape, names):
    folder = copied(kind)
    reweigh(folder, lambda all_of: {name: torch.ones(shape) if part in name else all_of[name] for name in all_of})
    assert names in refused(kind, folder)


# --------------------------------------------------------------------------------------------------------- the files
SPOILT = {  # text in place of a file -> what is said
    POINTER: "HERE/{} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    "": "HERE/{} is empty",
}
USED = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "processor_config.json", "config.json", "chat_template.jinja", "special_tokens_map.json"]  # fmt: skip


@pytest.mark.parametrize("text", SPOILT)
@pytest.mark.parametrize("name", USED)
def test_a_file_that_is_only_a_pointer_or_empty_is_named(copied, refused, name, text):
    folder = copied("qwen2_5")
    if name == "special_tokens_map.json":  # read where tokenizer_config.json lists no tokens
        edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    (folder / name).write_text(text)
    assert SPOILT[text].format(name) in refused("qwen2_5", folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", [name for name in USED if name.endswith("config.json")])
def test_json_that_transformers_cannot_decode_is_named(copied, refused, name, encoding):
    folder = copied("qwen2_5")
    (folder / name).write_text((folder / name).read_text(), encoding=encoding)
    said = refused("qwen2_5", folder)
    assert said.startswith(f"run.py: HERE/{name} ")
    if encoding != "utf-16-le":  # zeros between the letters: it is UTF-8, and no JSON
        assert f"HERE/{name} must be UTF-8 text" in said


@pytest.mark.parametrize("name", ["qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json"])
def test_the_q_former_never_gets_the_other_tokenizer(copied, refused, name):
    folder = copied("blip")
    (folder / name).write_text(POINTER)
    assert f"HERE/{name} is a Git LFS pointer" in refused("blip", folder)
    shutil.rmtree(folder / "qformer_tokenizer")
    assert "HERE cannot be used: it lacks the folder qformer_tokenizer" in refused("blip", folder)


def test_each_tokenizer_has_a_vocabulary_of_its_own(copied, refused):
    folder = copied("blip")
    vocabulary = (folder / "qformer_tokenizer" / "tokenizer.json").read_bytes()
    (folder / "qformer_tokenizer" / "tokenizer.json").unlink()
    assert "HERE/qformer_tokenizer has no tokenizer: " in refused("blip", folder)
    (folder / "qformer_tokenizer" / "tokenizer.json").write_bytes(vocabulary)
    (folder / "tokenizer.json").unlink()
    assert "HERE has no tokenizer: " in refused("blip", folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "README.md"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_tokenizer_does_not_matter(copied, saved, kind, name):
    folder = copied(kind)
    (folder / "old_tokenizer").mkdir()
    (folder / "old_tokenizer" / name).write_text(POINTER)
    assert same_weights(folder, saved[kind], kind)


def vocabulary(words, folder):
    """A tokenizer.json by which the words of a question are nothing, unknown, special or broken; or one is known."""
    ids = {"<unk>": 0, "what": 1} if words == "one word" else {} if words == "broken" else {"<unk>": 0}
    rest = Tokenizer(models.BPE() if words == "nothing" else models.WordLevel(ids, unk_token="<unk>"))
    rest.pre_tokenizer = pre_tokenizers.Whitespace()
    if words == "special":
        rest.add_special_tokens(["what", "is", "it", "?"])
    rest.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", unk_token=None if words in ("nothing", "broken") else "<unk>")


PLACES = [("blip", "", "its tokenizer (tokenizer.json"), ("llava", "", "its tokenizer (tokenizer.json"),
          ("blip", "qformer_tokenizer", "the tokenizer of its Q-Former (folder qformer_tokenizer)")]  # fmt: skip


@pytest.mark.parametrize("words", ["nothing", "unknown", "special", "broken"])
@pytest.mark.parametrize(("kind", "place", "shown"), PLACES)
def test_a_tokenizer_that_knows_no_word_is_refused(copied, refused, kind, place, shown, words):
    folder = copied(kind)
    vocabulary(words, folder / place)
    said = refused(kind, folder)
    assert f"HERE cannot be used: {shown}" in said
    assert ("cannot read" if words == "broken" else "must know the words of a question, and 'what is it?' is ") in said


def test_a_tokenizer_that_knows_some_words_is_not_refused(copied):
    folder = copied("blip")
    vocabulary("one word", folder / "qformer_tokenizer")
    load_model("blip", folder, "cpu")


@pytest.mark.parametrize(("kind", "place", "shown"), [*PLACES, ("qwen2_5", "", "its tokenizer (tokenizer.json")])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(copied, refused, kind, place, shown):
    folder = copied(kind)
    tokenizer = Tokenizer.from_file(str(folder / place / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save(str(folder / place / "tokenizer.json"))
    last = tokenizer.get_vocab_size() - 1
    said = refused(kind, folder)
    assert f"HERE cannot be used: {shown}" in said
    assert f"has 'word8' as token {last}, and its model has embeddings of 0 to " in said


@pytest.mark.parametrize("kind", TINY)
def test_a_model_may_have_more_embeddings_than_its_tokenizer_has_tokens(kind):
    model, processor = load_model(kind, TINY[kind], "cpu")
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 64)
    model_module(kind).prepare(model, processor)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model"])
def test_a_vocabulary_counts_where_there_is_no_tokenizer_json(copied, refused, saved, name):
    folder = copied("llava")
    (folder / name).write_text(POINTER)
    assert same_weights(folder, saved["llava"], "llava")
    (folder / "tokenizer.json").unlink()
    assert f"HERE/{name} is a Git LFS pointer" in refused("llava", folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json", "preprocessor_config.json"])
def test_a_pointer_that_is_not_used_harms_nobody(copied, saved, name):
    folder = copied("llava_next")
    (folder / name).write_text(POINTER)
    assert same_weights(folder, saved["llava_next"], "llava_next")


@pytest.mark.parametrize("left", [4, 1000, -1])
def test_a_file_of_weights_that_was_cut_short_is_named(copied, refused, left):
    weights = copied("llava") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert "HERE/model.safetensors is cut short or broken" in refused("llava", weights.parent)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_parts_are_all_there_or_the_part_is_named(copied, refused, saved, suffix):
    folder = copied("llava")
    first, second = in_parts(folder, suffix)
    assert same_weights(folder, saved["llava"], "llava")
    whole = second.read_bytes()
    for spoilt, says in ((whole[:-100], "is cut short or broken"), (POINTER.encode(), "is a Git LFS pointer"),
                         (b"", "is empty")):  # fmt: skip
        second.write_bytes(spoilt)
        assert f"HERE/{second.name} {says}" in refused("llava", folder)
    second.unlink()
    assert f"HERE lacks {second.name}, one of 2 files" in refused("llava", folder)
    next(folder.glob("*.index.json")).write_text('{"weight_map": []}')
    assert "no weight_map" in refused("llava", folder)
    for path in folder.glob("*.index.json"):
        path.unlink()
    assert "HERE has no weights" in refused("llava", folder)


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04 torn", b"\x80\x02 an old pickle, torn"])
def test_a_broken_file_of_torch_save_is_refused(copied, refused, content):
    folder = copied("llava")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "HERE" in refused("llava", folder)


# ------------------------------------------------------------------------------------------------- code and packages
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"model_type": "new_vl", "auto_map": {"AutoConfig": "own.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
        ("processor_config.json", {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_code_of_a_checkpoint_is_never_run(copied, refused, monkeypatch, kind, name, fields):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    folder = copied(kind)
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    edit(folder / name, **fields)
    assert "code" in (said := refused(kind, folder))
    assert "never run" in said


def test_code_that_is_not_needed_is_left_alone(copied, saved):
    folder = copied("llava")
    (folder / "custom_generate").mkdir()
    for path in (folder / "own.py", folder / "custom_generate" / "generate.py"):
        path.write_text("raise SystemExit('it was run')")
    edit(folder / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    assert same_weights(folder, saved["llava"], "llava")


@pytest.mark.parametrize(
    ("how", "more", "package"),
    [
        ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
        ("gptq", {}, "optimum|gptqmodel"),
        ("compressed-tensors", {}, "compressed-tensors"),
        ("unheard", {}, "unheard"),
    ],
)
def test_a_package_that_a_quantised_checkpoint_needs_is_named(copied, how, more, package):
    folder = copied("llava")
    edit(folder / "config.json", quantization_config={"quant_method": how, "bits": 4} | more)
    with pytest.raises(ValueError, match=f"checkpoint .*({package})"):
        load_model("llava", folder, "cpu")


def test_whatever_loading_raises_is_one_sentence_but_for_a_full_memory(saved, monkeypatch):
    def fails(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr("vicrop.models.llava.load_processor", load)

    for error in (KeyError("image"), RuntimeError("first line\nsecond"), AssertionError(), ZeroDivisionError("x")):
        fails(error)
        with pytest.raises(ValueError, match=f"{saved['llava']} cannot be used: {type(error).__name__}") as caught:
            load_model("llava", saved["llava"], "cpu")
        assert "second" not in str(caught.value)
        assert caught.value.__cause__ is error
    for error in (MemoryError(), torch.OutOfMemoryError("full")):
        fails(error)
        with pytest.raises(type(error)):
            load_model("llava", saved["llava"], "cpu")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("it needs:\n\n  accelerate\nand more", "it needs: accelerate"),
        ("it needs:", "it needs:"),
        ("\n it fails\nhere", "it fails"),
        ("", "ValueError: "),
    ],
)
def test_a_reason_goes_on_where_its_first_line_ends_in_a_colon(text, says):
    assert reason(ValueError(text)) == says


# ----------------------------------------------------------------------------------------------- what may be missing
def answers_of(kind, folder):
    """(prompt, original answer, answer with crop, box) about a picture."""
    model, processor = load_model(kind, folder, "cpu")
    session = ImageSession([photo()], model, processor)
    prompt = session.adapter.prompt("one?")
    return (
        prompt,
        vicrop_qa(kind, "rel_att", photo(), "one?", model, processor, layer=1),
        stock_generate(session, prompt, max_new_tokens=5, do_sample=False),
    )


def test_a_config_from_before_the_image_token_answers_as_others_do(copied, saved):
    folder = copied("blip")
    edit(folder / "config.json", image_token_index=None)
    assert answers_of("blip", folder) == answers_of("blip", saved["blip"])
    model, processor = blip_methods.MODEL_CLASS.from_pretrained(folder), blip_methods.load_processor(folder)
    with pytest.raises(ValueError, match="no image_token_index"):
        vicrop_qa("blip", "rel_att", photo(), "one?", model, processor)


class Words:
    """As much of a tokenizer as `place_token` asks."""

    def __init__(self, ids, special, pad=None, unk=None, bos=None):
        self.ids, self.all_special_ids, self.pad_token_id = ids, special, pad
        self.unk_token_id, self.bos_token_id = unk, bos

    def get_vocab(self):
        return self.ids

    def __call__(self, text):
        return types.SimpleNamespace(input_ids=[self.bos_token_id, 3])


@pytest.mark.parametrize(
    ("rows", "more", "found"),
    [
        (6, {"<image>": 5, "<pad>": 4}, 5),  # its own token
        (5, {"<image>": 5, "<pad>": 4}, 4),  # it has no embedding: it was added when the processor was loaded
        (8, {"<pad>": 4}, 5),  # the embeddings have more rows than there are tokens
        (4, {"<image>": 4}, 2),  # the end: no prompt holds it, but each holds the beginning, and some what is unknown
    ],
)
def test_the_image_takes_the_place_of_a_token_that_no_prompt_holds(rows, more, found):
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3} | more
    tokenizer = Words(ids, [0, 1, 2, *more.values()], pad=more.get("<pad>"), unk=0, bos=1)
    assert place_token(tokenizer, rows) == found


def test_where_no_token_is_free_for_the_image_it_is_said():
    with pytest.raises(ValueError, match="no token is free"):
        place_token(Words({"<unk>": 0, "<s>": 1, "word": 2}, [0, 1], unk=0, bos=1), 3)


TEMPLATES = {
    "one": lambda template: template,
    "a list of named ones": lambda template: [{"name": "default", "template": template},
                                              {"name": "tool_use", "template": "no image"}],
    "a list of one": lambda template: [{"name": "default", "template": template}],
}  # fmt: skip


@pytest.mark.parametrize("how", TEMPLATES)
def test_a_chat_template_may_be_where_the_tokenizer_keeps_it(copied, saved, how):
    folder = copied("qwen2_5")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATES[how](template))
    assert answers_of("qwen2_5", folder) == answers_of("qwen2_5", saved["qwen2_5"])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ messages[0].role }}: a text only", "0 times"),
        ("{% for _ in range(2) %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}what?", "2 times"),
        ("<|vision_start|><|image_pad|><|vision_end|>", "0 times"),  # without the question
        ("{% if %}", "HERE cannot be used: "),
        ("{{ raise_exception('no images') }}", "HERE cannot be used: "),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_at_once(copied, refused, template, says):
    folder = copied("qwen2_5")
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    assert says in refused("qwen2_5", folder)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5"])
def test_the_image_token_of_config_and_tokenizer_is_one(copied, refused, kind):
    folder = copied(kind)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", **{name: 5 for name in ("image_token_index", "image_token_id") if name in config})
    assert "is token 5 by its config.json" in refused(kind, folder)


# ---------------------------------------------------------------------------------------------------- finite answers
def spoilt(kind, value):
    """A model whose logits are not finite, and its attention is."""
    model, processor = KINDS[kind]()
    model.get_output_embeddings().weight.data[7] = value
    return model, processor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_comes_from_logits_that_are_not_finite(kind, value):
    session = ImageSession([photo()], *spoilt(kind, value))
    prompt = session.adapter.prompt("one?")
    head = session.model.get_output_embeddings()
    for ask in (
        lambda: session.answer(prompt),
        lambda: session.answer(prompt, crops=[photo(40, 40)]),
        lambda: weighted_attention(session, prompt, [1]),
        lambda: stock_generate(session, prompt, max_new_tokens=2, do_sample=False),
        lambda: stock_generate(session, prompt, max_new_tokens=2, do_sample=False, num_beams=2),
    ):
        with pytest.raises(ValueError, match=r"logits .* are (NaN|infinite).* --dtype bfloat16 or float32"):
            ask()
    assert not head._forward_hooks


@pytest.fixture
def unsound(tmp_path):
    """(folder with a checkpoint whose logits are NaN, data.json of two records, folder of the images)."""
    model, processor = spoilt("llava", float("nan"))
    model.config.att_layer = 1
    for part in (model, processor):
        part.save_pretrained(tmp_path / "unsound")
    photo().save(tmp_path / "a.png")
    records = [{"id": key, "question": "what?", "labels": ["1"], "image_path": "a.png", "gt_bbox": [9, 9, 30, 30]}
               for key in "12"]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    asked = ["--task", "demo", "--question_path", tmp_path / "data.json", "--image_path", tmp_path]
    return ["--model", "llava", "--model_id", tmp_path / "unsound", "--device", "cpu"], asked


def test_every_method_says_that_logits_are_not_finite(unsound, croppers, tmp_path):
    common, asked = unsound
    common, methods = [*common, "--save_path", tmp_path / "out"], ",".join(METHODS)
    with pytest.raises(SystemExit, match="no record could be answered"):
        run.main([str(each) for each in [*common, *asked, *croppers, "--method", methods, "--batch_size", "2"]])
    for method in METHODS:
        for record in json.loads((tmp_path / "out" / f"llava-demo-{method}.json").read_text()):
            assert "logits of the next token are NaN" in record["error"]
            assert record["original_answer"] == record["crop_answer"] == ""
    ask = ["--image", tmp_path / "a.png", "--question", "what?", "--method", "center_crop"]
    with pytest.raises(SystemExit, match="^run.py: the logits of the next token are NaN"):
        run.main([str(each) for each in [*common, *ask]])


@pytest.mark.parametrize("finding", ["layers", "overhead", "attention"])
def test_a_finding_is_not_made_of_logits_that_are_not_finite(unsound, tmp_path, capsys, finding):
    common, asked = unsound
    with pytest.raises(SystemExit, match=r"no record could be measured \(--retry_errors tries them again\)"):
        findings.main([str(each) for each in [finding, *common, *asked, "--out", tmp_path / "out"]])
    assert "logits of the next token are NaN" in capsys.readouterr().err


def test_a_finding_forgets_nothing_for_a_checkpoint_that_cannot_be_loaded(copied, tmp_path):
    folder, out = copied("llava"), tmp_path / "out"
    photo().save(tmp_path / "a.png")
    record = {"id": "1", "question": "?", "labels": ["1"], "image_path": "a.png", "gt_bbox": [9, 9, 30, 30]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    command = ["attention", "--model", "llava", "--model_id", folder, "--device", "cpu", "--out", out,
               "--question_path", tmp_path / "data.json", "--image_path", tmp_path, "--overwrite"]  # fmt: skip
    findings.main(list(map(str, command)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    reweigh(folder, without("multi_modal_projector"))
    with pytest.raises(SystemExit, match="lacks 4 of its model's weights"):
        findings.main(list(map(str, command)))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# ------------------------------------------------------------------------------------------------------ localization
@pytest.fixture
def localize(tmp_path, monkeypatch):
    """(family, checkpoint, more) -> runs localization.pipeline in this process; returns the files that it wrote."""
    photo().save(tmp_path / "a.png")
    lines = [json.dumps({"id": key, "prompt": "a sign", "image_path": "a.png"}) for key in "12"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    asked = {
        "collect": [f"data.image_file={tmp_path / 'a.png'}", "data.query=a sign"],
        "batch": [f"data.data_file={tmp_path / 'data.jsonl'}", "data.process_all=true"],
    }

    def run_stage(stage, family, checkpoint, *more):
        model = [f"model.family={family}", f"model.name={checkpoint}", "model.device=cpu", "model.look.image_fit=null"]
        where = f"data.output_dir={tmp_path / 'out'}"
        monkeypatch.setattr("sys.argv", ["pipeline", f"stage={stage}", *model, where, *asked[stage], *more])
        with pytest.raises(SystemExit) as stopped:
            pipeline.main()
        assert not [path for path in tmp_path.rglob("out/**/*") if path.is_file()]
        return str(stopped.value.code)

    return run_stage


@pytest.mark.parametrize("stage", ["collect", "batch"])
def test_localization_goes_through_the_same_door(localize, saved, copied, stage):
    assert "use --model qwen2_5 (in localization, model.family=qwen2_5)" in localize(stage, "llava", saved["qwen2_5"])
    folder = copied("llava")
    reweigh(folder, without("multi_modal_projector"))
    assert "lacks 4 of its model's weights" in localize(stage, "llava", folder)


@pytest.mark.parametrize("stage", ["collect", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_model_that_overflows_is_not_stored(localize, tmp_path, capsys, kind, stage):
    model, processor = KINDS[kind]()
    list(model.get_decoder().layers)[1].mlp.down_proj.weight.data[:] = float("nan")  # the last layer reads it
    for part in (model, processor):
        part.save_pretrained(tmp_path / "unsound")
    said = localize(stage, kind, tmp_path / "unsound") + capsys.readouterr().err
    assert "attention values are NaN or infinite" in said
    said = localize(stage, kind, tmp_path / "unsound", "model.use_generate=true") + capsys.readouterr().err
    assert "logits of the next token are NaN" in said
