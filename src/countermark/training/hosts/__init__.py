"""Architectures of the host models, one file for each family; `training.models` lists their names."""
