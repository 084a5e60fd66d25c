"""Unmarked host models by the hundred, to test null hypotheses on."""
