"""Localization heads: the few attention heads of a multimodal LLM that ground a phrase (arXiv 2503.06287).

`analyze` and `bbox` are numpy only and know no model; `collector` reads attention through the same session as ViCrop.
"""
