"""The architectures of the host models, one file a family; `bench.models` knows them by name."""
