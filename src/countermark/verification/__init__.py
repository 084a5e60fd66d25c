"""Judge a suspect by a key: verify, identify, dispute, disclosure, image sets and unmarked models."""
