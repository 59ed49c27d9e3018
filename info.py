"""The tables: models, tasks, methods, options. They are those of vicrop/tables.py."""

from vicrop.tables import ALIASES, GENERAL_PROMPT, METHODS, MODELS, OPTIONS, SIZES, TASKS, checkpoint_of, known

__all__ = ["ALIASES", "GENERAL_PROMPT", "METHODS", "MODELS", "OPTIONS", "SIZES", "TASKS", "checkpoint_of", "known"]
