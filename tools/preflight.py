"""Says in one line what this machine lacks before anything is installed (any Python 3 runs it)."""

import shutil
import sys

NEED_GB = 4.0


def missing():
    """The first thing that stands in the way, or None."""
    if sys.version_info < (3, 11):
        found = ".".join(str(part) for part in sys.version_info[:3])
        return "Python 3.11 or newer is needed, this is %s: make demo PYTHON=python3.11" % found
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "the venv module is missing: apt-get install python3-venv, or another Python"
    free = shutil.disk_usage(".").free / 1e9
    if free < NEED_GB:
        return "%.1f GB of free disk are needed here, %.1f GB are left" % (NEED_GB, free)
    return None


if __name__ == "__main__":
    problem = missing()
    if problem:
        sys.exit("countermark: " + problem)
