"""Architectures of the host models, one file for each family; `bench.models` lists their names."""
