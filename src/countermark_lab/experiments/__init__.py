"""Experiments as TOML files, their cells, and the program that computes cells."""
