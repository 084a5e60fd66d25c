"""The owner's secret: the key, its folder on disk, the keyed streams and the message that it expands to."""
