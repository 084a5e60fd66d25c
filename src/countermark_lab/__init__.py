"""Experiments of the papers, their tables and figures, and speed; runs in a clone, is in no wheel."""
