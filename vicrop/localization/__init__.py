"""Localization heads: the few attention heads of a multimodal LLM that ground a phrase (arXiv 2503.06287).

`grounding`, and vicrop/heads.py, which chooses the heads, compute with numpy and know no model; `collector` reads
attention through the same sessions as ViCrop.
"""
