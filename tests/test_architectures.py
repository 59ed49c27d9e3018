"""Every image-text architecture of transformers is carried, or refused with its reason, or compared at first use."""

import json
import re

import families_tiles
import pytest
import table_of_families as table
import transformers
from builders import photo
from families_tiles import blip_2
from strangers import deepseek
from test_families import CROP
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration

from vicrop import adapter as adapters
from vicrop import guard, load_model, verify
from vicrop.adapter import DEFAULT_MODULE, REGISTRY, adapter_class
from vicrop.checkpoints import module_of
from vicrop.files import ROOT
from vicrop.models.blip2 import Blip2Adapter
from vicrop.refusals import AS_OF, CHECKED, REFUSED
from vicrop.session import ImageSession

CARRIED = set(table.builders()) - {"pixtral"}  # a tower, no architecture


# ------------------------------------------------------------------------------------------------------- which is which
def test_every_architecture_is_in_one_list():
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for one, other in ((CARRIED, REFUSED), (CARRIED, CHECKED), (REFUSED, CHECKED)):
        assert not set(one) & set(other)
    everything = CARRIED | set(REFUSED) | set(CHECKED)
    assert everything <= known
    if transformers.__version__.startswith(AS_OF):  # newer ones add some: they are unknown
        assert known == everything


def test_every_family_of_the_registry_has_a_small_model():
    assert {kind for kind in REGISTRY if "+" not in kind} <= CARRIED


def test_reasons_are_sentences():
    for reason in (*REFUSED.values(), *CHECKED.values()):
        assert reason[0].islower()
        assert reason[-1] != "."


@pytest.mark.parametrize("kind", ["florence2", "mllama", "chameleon"])
def test_a_refusal_quotes_the_reason(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "verify_twin", lambda *_, **__: 1 / 0)  # nothing is tried
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for ask in (lambda: load_model(str(tmp_path), device="cpu"),
                lambda: load_model("llava", tmp_path, device="cpu")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(REFUSED[kind])) as refused:
            ask()
        assert "\n" not in str(refused.value)


def test_a_loaded_model_is_refused_with_the_reason_unless_someone_has_written_an_adapter(monkeypatch):
    model, _ = deepseek()
    monkeypatch.setattr(type(model.config), "model_type", "mllama")
    with pytest.raises(ValueError, match="mllama models are not carried: its decoder looks at the image by cross"):
        adapter_class(model)
    monkeypatch.setitem(adapters.REGISTRY, "mllama", "vicrop.models.llava")
    assert adapter_class(model).__name__ == "LlavaAdapter"


def test_an_architecture_that_a_newer_transformers_adds_is_compared_at_first_use(monkeypatch):
    monkeypatch.setitem(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "brand_new", Qwen2VLForConditionalGeneration)
    assert module_of({"model_type": "brand_new"}, "HERE") == DEFAULT_MODULE
    for kind in CHECKED:
        assert module_of({"model_type": kind}, "HERE") == DEFAULT_MODULE
    with pytest.raises(ValueError, match="is no image-text model of transformers"):
        module_of({"model_type": "not_there"}, "HERE")


# ---------------------------------------------------------------------------------------------- a crop that goes unseen
def test_blip_2s_own_processor_drops_a_second_image_and_ours_does_not():
    model, processor = blip_2()
    text, image = "Question: why? Short answer:", photo()
    one, two = (processor(images=images, text=text, return_tensors="pt") for images in ([image], [image, CROP]))
    assert len(two["pixel_values"]) == 2
    assert model(**one).logits.equal(model(**two).logits)  # the trap, in transformers itself
    session = ImageSession([image], model, processor)
    first, second = (verify.own_logits(session, text, crop) for crop in (CROP, photo(50, 60, seed=2)))
    assert verify.relative_error(first, second) > 0.01


class AsItsProcessor(Blip2Adapter):
    """BLIP-2 with the places of one image only, as its processor writes them."""

    def tokenize(self, prompt, layouts):
        return super().tokenize(prompt, layouts[:1])


def test_a_session_refuses_an_answer_with_a_crop_that_the_decoder_is_not_handed(monkeypatch):
    model, processor = blip_2()
    monkeypatch.setattr("vicrop.models.blip2.ADAPTER", AsItsProcessor)
    session = ImageSession([photo()], model, processor)
    prompt = session.adapter.prompt("why?")
    assert session.answer(prompt)
    with pytest.raises(ValueError, match="the crop changes nothing: the model takes one image"):
        session.answer(prompt, crops=[CROP])


def ignoring(model):
    """The model, blind to every image but the first: its features are noughts, however they come; so are its copies."""
    stock = type(model.model)

    class Blind(stock):
        def forward(self, *, pixel_values=None, mm_encoder_outputs=None, **others):
            if pixel_values is not None:
                mm_encoder_outputs = {"image": self.get_image_features(pixel_values=pixel_values, return_dict=True)}
            if mm_encoder_outputs is not None:
                features = mm_encoder_outputs["image"].pooler_output.clone()
                per_image = 16  # tokens
                features.view(-1, features.shape[-1])[per_image:] = 0
                mm_encoder_outputs["image"].pooler_output = features
            return super().forward(mm_encoder_outputs=mm_encoder_outputs, **others)

    model.model.__class__ = Blind
    return model


def test_a_model_that_ignores_a_second_image_is_refused_at_first_use(monkeypatch, tmp_path):
    monkeypatch.setenv("VICROP_CACHE", str(tmp_path))
    for blind in (False, True):
        model, processor = deepseek()
        model = families_tiles.admitted(ignoring(model) if blind else model)
        found = verify.verify_loaded(model, processor).differs
        assert found == ([verify.UNSEEN_CROP] if blind else [])
        session = ImageSession([verify.picture(verify.SIZES[0])], model, processor)
        assert verify.verify_picture(session).differs == found
    with pytest.raises(ValueError, match="cannot be asked about an image and a crop of it: the crop changes nothing"):
        guard.admit_model(model, processor, "planted")


# ------------------------------------------------------------------------------------------------------------- the docs
def test_the_page_lists_every_architecture_once_with_figures_or_a_reason():
    figures = table.kept()
    assert {name for name in figures if name != "pixtral"} == CARRIED
    for name, row in figures.items():
        assert row["differs"] == [], name
        assert verify.BOUNDS.keys() - row["errors"] <= {"pixels"}, name  # pure_grad is refused where nothing is told
        for what, error in row["errors"].items():
            assert error <= 10 * verify.BOUNDS[what], name  # what is above it is the stock model's own error
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert page == table.page_with(page, figures), "python tests/table_of_families.py --write"
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    rows = [name for name in rows if name != "model_type"]  # the tables' heads
    assert sorted(rows) == sorted({*figures, *REFUSED, *CHECKED})
