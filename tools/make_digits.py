"""Writes src/countermark/training/digits/digits.npz: python tools/make_digits.py DATA_DIRECTORY.

DATA_DIRECTORY holds MNIST in the layout of the hub: ylecun/mnist/mnist/{train,test}-*.parquet.
The first 6,000 training and 1,000 test rows are kept, pixels unchanged. Two runs with one zlib
write the same bytes; another zlib may pack the same arrays into others.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet

ROWS = {"train": 6000, "test": 1000}
TARGET = Path(__file__).parents[1] / "src/countermark/training/digits/digits.npz"


def rows(source, split, count):
    """Images (N, 1, 28, 28) and labels (N,), both uint8, of the first `count` rows."""
    path = source / f"ylecun/mnist/mnist/{split}-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(path).slice(0, count)
    cells = table["image"].to_pylist()
    images = [np.asarray(PIL.Image.open(io.BytesIO(cell["bytes"]))) for cell in cells]
    return np.stack(images)[:, None], table["label"].to_numpy().astype(np.uint8)


def write(path, arrays):
    """What np.savez_compressed writes, with 1980 in place of now as the time of each entry."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(info, entry.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main(source):
    arrays = {}
    for split, count in ROWS.items():
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = rows(source, split, count)
    write(TARGET, arrays)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
