"""Marks in weights at places that only the key knows."""
