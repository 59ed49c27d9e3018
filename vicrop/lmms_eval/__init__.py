"""ViCrop as a model of lmms-eval: what its entry point (see pyproject.toml) leads to, and the model itself."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vicrop", chat_class_path="vicrop.lmms_eval.model.ViCrop")
