"""One thread a worker, whoever starts the tests: workers of two threads only get in the way."""

from __future__ import annotations

import os

# Before torch is imported, which reads it once.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
