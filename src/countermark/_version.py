"""The version of the installed package, read from its metadata once."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("countermark")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+source"
