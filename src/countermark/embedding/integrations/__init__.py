"""Adapters for training loops of other libraries: one module each, behind the library's extra."""
