"""Other people's training loops; one short file each, imported by name, behind its extra."""
