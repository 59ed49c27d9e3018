"""Localization heads: the few attention heads of a multimodal LLM that ground a phrase (arXiv 2503.06287).

`grounding` is numpy only and knows no model, as vicrop/heads.py, which chooses the heads; `collector` reads attention
through the same session as ViCrop.
"""
