"""The smallest experiment that has everything: an unmarked row, a marked one, a pruning."""

SMALL = """
name = "small"
title = "Small"
track = "100 digits"
seeds = [1, 2]
[host]
model = "mlp"
data = "digits"
train = 100
test = 100
epochs = 1
[prune]
layers = ["2.weight"]
fractions = [0.5]
[[rows]]
label = "not embedded"
[[rows]]
label = "marked"
scheme = "uchida"
[rows.fields]
layer = "2.weight"
bits = 128
strength = 1.0
"""
