"""Tools with no knowledge of marks: files, Merkle trees, progress bars, output paths, plug-ins."""
