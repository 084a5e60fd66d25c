"""Data sets: the bundled digits, directories in both layouts, hub ids, and what is refused."""

import hashlib
import io
import json
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import countermark.training.data as module
from countermark.errors import DataError, MissingExtraError
from countermark.training.data import Dataset, load_data

SHARED = Path(__file__).parents[3] / "shared" / "data"
DIGITS = Path(module.__file__).parent / "digits" / "digits.npz"
IMAGE = {"_type": "Image"}

shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_parquet(
    folder: Path,
    split: str,
    pictures: list[bytes | None],
    labels: list[int | None],
    columns: tuple[str, str] = ("img", "fine_label"),
) -> None:
    """One split in hub layout, with the feature schema that the hub writes."""
    label = {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}
    features = {"note": {"dtype": "string", "_type": "Value"}, columns[0]: IMAGE, columns[1]: label}
    cells = [{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(pictures)]
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "note": pa.array(["-"] * len(cells)),
            columns[0]: pa.array(cells, picture_type),
            columns[1]: pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def tiny(tmp_path: Path, **replaced: Any) -> str:
    """A directory of 4 training and 2 test pictures; `pictures` and `labels` replace the first."""
    grey = noise(4, 6, 5)
    train = replaced.get("pictures", [encoded(picture) for picture in grey])
    write_parquet(tmp_path / "default", "train", train, replaced.get("labels", [2, 0, 1, 0]))
    write_parquet(tmp_path / "default", "test", [encoded(p) for p in grey[:2]], [1, 0])
    return str(tmp_path)


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        load_data(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_digits_hold_the_promised_rows() -> None:
    digits = load_data("digits")
    assert (digits.name, digits.classes) == ("digits", 10)
    assert digits.train_images.shape == (6000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.train_labels.bincount().tolist() == DIGIT_COUNTS["train"]
    assert digits.test_labels.bincount().tolist() == DIGIT_COUNTS["test"]


DIGIT_COUNTS = {
    "train": [577, 679, 604, 592, 583, 596, 609, 617, 536, 607],
    "test": [101, 113, 96, 96, 116, 87, 107, 88, 105, 91],
}


def test_digits_are_the_file_that_was_released() -> None:
    data = DIGITS.read_bytes()
    assert len(data) <= 1_500_000
    assert hashlib.sha256(data).hexdigest() == (
        "0619e15985edec6de8772263c5079a966c8e92a05213e0b34c0c91818ef3d1c3"
    )


def test_digits_carry_their_licence() -> None:
    text = (DIGITS.parent / "LICENSE-MNIST.txt").read_text()
    assert "Attribution-ShareAlike 3.0" in text
    assert "Yann LeCun and Corinna Cortes" in text


def test_digits_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "PIL", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_data("digits").classes == 10


def test_normalised_training_images_are_standardised() -> None:
    digits = load_data("digits")
    images = digits.normalised(digits.train_images, torch.float64)
    assert images.mean().item() == pytest.approx(0, abs=1e-9)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-9)
    assert digits.normalised(digits.test_images[:2]).dtype == torch.float32
    assert digits.train_images.dtype == torch.uint8


def colours() -> Dataset:
    train = torch.from_numpy(noise(8, 3, 4, 4))
    train[:, 1] = 7
    labels = torch.arange(8) % 3
    return Dataset("colours", train, labels, train[:4].clone(), labels[:4], 3)


def test_normalised_counts_channels_apart_and_survives_a_constant_one() -> None:
    data = colours()
    images = data.normalised(data.train_images, torch.float64)
    reference = data.train_images.double() / 255
    for channel in (0, 2):
        values = reference[:, channel]
        wanted = (values - values.mean()) / values.std(correction=0)
        assert torch.allclose(images[:, channel], wanted)
    assert not images[:, 1].any()


def test_normalised_takes_its_scale_from_the_training_images() -> None:
    data = colours()
    whole = data.normalised(data.train_images)
    assert torch.equal(data.normalised(data.test_images), whole[:4])


def test_subset_keeps_the_first_rows() -> None:
    digits = load_data("digits")
    few = digits.subset(train=100, test=7)
    assert torch.equal(few.train_images, digits.train_images[:100])
    assert torch.equal(few.test_labels, digits.test_labels[:7])
    assert (few.name, few.classes) == (digits.name, digits.classes)
    assert len(digits.subset(train=5).test_images) == 1000
    scaled = few.normalised(few.train_images, torch.float64)
    assert scaled.mean().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows", [0, -1, 6001])
def test_subset_refuses_rows_that_are_not_there(rows: int) -> None:
    with pytest.raises(DataError, match=f"expected 1 to 6000 train rows, got {rows}"):
        load_data("digits").subset(train=rows)


def test_parquet_in_hub_layout_comes_back_row_for_row(tmp_path: Path) -> None:
    data = load_data(tiny(tmp_path))
    wanted = torch.from_numpy(noise(4, 6, 5))[:, None]
    assert torch.equal(data.train_images, wanted)
    assert torch.equal(data.test_images, wanted[:2])
    assert data.train_labels.tolist() == [2, 0, 1, 0]
    assert data.test_labels.tolist() == [1, 0]
    assert (data.classes, data.name) == (3, str(tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_colour_pictures_keep_their_channels(tmp_path: Path, kind: str) -> None:
    pixels = noise(3, 6, 5, 3)
    pictures = [encoded(picture, kind) for picture in pixels]
    data = load_data(tiny(tmp_path, pictures=pictures, labels=[2, 0, 1]))
    assert torch.equal(data.train_images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.train_images.is_contiguous()


def test_a_grey_picture_among_coloured_ones_gets_three_channels(tmp_path: Path) -> None:
    grey, colour = noise(1, 6, 5)[0], noise(1, 6, 5, 3)[0]
    data = load_data(tiny(tmp_path, pictures=[encoded(grey), encoded(colour)], labels=[2, 0]))
    assert data.train_images.shape == (2, 3, 6, 5)
    assert data.test_images.shape == (2, 3, 6, 5)
    assert torch.equal(data.train_images[0], torch.from_numpy(grey).expand(3, 6, 5))


def test_a_directory_leaves_no_copy_in_the_cache(tmp_path: Path) -> None:
    import datasets.config

    load_data(tiny(tmp_path))
    cached = [path for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in cached) == 0


def write_folder(root: Path, test_split: str) -> None:
    for split, count in (("train", 8), (test_split, 2)):
        for name in ("bee", "ant"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for row, pixels in enumerate(noise(count, 4, 4, 3)):
                pixels[0, 0] = ("ant", "bee").index(name)
                (folder / f"{row}.png").write_bytes(encoded(pixels))


@pytest.mark.parametrize("test_split", ["test", "validation", "val"])
def test_image_folder(tmp_path: Path, test_split: str) -> None:
    write_folder(tmp_path, test_split)
    data = load_data(str(tmp_path))
    assert data.train_images.shape == (16, 3, 4, 4)
    assert data.test_images.shape == (4, 3, 4, 4)
    assert data.classes == 2
    # The corner pixel of each picture says its class: labels and pictures stay together.
    assert torch.equal(data.train_images[:, 0, 0, 0].long(), data.train_labels)
    assert torch.equal(data.test_images[:, 0, 0, 0].long(), data.test_labels)


def test_image_folder_is_shuffled_the_same_way_each_time(tmp_path: Path) -> None:
    write_folder(tmp_path, "test")
    first, second = load_data(str(tmp_path)), load_data(str(tmp_path))
    assert torch.equal(first.train_images, second.train_images)
    assert set(first.subset(train=6).train_labels.tolist()) == {0, 1}


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    message = refusal(str(tmp_path / "nowhere"))
    assert f"looked for {tmp_path / 'nowhere'}" in message
    assert "a hub id reads owner/name and needs the network" in message


@pytest.mark.parametrize("name", ["digit", "", "../nope/set", "a/b/c", "there/mnist"])
def test_what_can_be_no_hub_id_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert refusal(name).startswith(f"no data directory {name!r}")


def test_hub_ids_go_to_the_library_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    directory, loader = tiny(tmp_path), datasets.load_dataset

    def load(name: str, streaming: bool) -> Any:
        assert (name, streaming) == ("owner/name", False)
        return loader(directory)

    monkeypatch.setattr("datasets.load_dataset", load)
    data = load_data("owner/name")
    assert torch.equal(data.train_images, torch.from_numpy(noise(4, 6, 5))[:, None])
    assert data.train_labels.tolist() == [2, 0, 1, 0]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, streaming: bool) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nin many words")

    monkeypatch.setattr("datasets.load_dataset", load)
    message = refusal("owner/name")
    assert "(hub ids need the network), got: Couldn't reach the Hub" in message


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"reading data sets .*'countermark\[data\]'"):
        load_data(str(tmp_path))


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "expected a data set in this directory" in refusal(str(tmp_path))


def test_a_single_split_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", [encoded(noise(1, 4, 4)[0])], [0])
    assert refusal(str(tmp_path)).endswith("splits train and test (or validation), got train")


def test_columns_without_a_picture_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"x": [1, 2]}), tmp_path / f"{split}.parquet")
    assert "expected a column with the feature image, got" in refusal(str(tmp_path))


def test_an_unlabelled_image_folder_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(encoded(noise(1, 4, 4)[0]))
    assert "label" in refusal(str(tmp_path))


@pytest.mark.parametrize("label", [-1, None])
def test_a_label_that_is_none_is_refused(tmp_path: Path, label: int | None) -> None:
    message = refusal(tiny(tmp_path, labels=[0, label, 1, 2]))
    assert f"row 1: expected a label from 0 to 2, got {label}" in message


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", encoded(noise(1, 6, 5)[0])[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n"],
    ids=["empty", "text", "truncated", "postscript"],
)
def test_an_undecodable_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    good = encoded(noise(1, 6, 5)[0])
    message = refusal(tiny(tmp_path, pictures=[good, data], labels=[1, 0]))
    assert "train row 1 (1.png): expected a picture, got: " in message
    assert message.endswith("; remove or repair it")


def test_a_picture_without_bytes_is_refused(tmp_path: Path) -> None:
    good = encoded(noise(1, 6, 5)[0])
    assert "expected a picture" in refusal(tiny(tmp_path, pictures=[good, None], labels=[1, 0]))


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    deep = encoded(np.full((6, 5), 1000, dtype=np.uint16))
    message = refusal(tiny(tmp_path, pictures=[deep], labels=[0]))
    assert "'I;16', not 8 bits of grey or colour" in message


def claiming(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 9)
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [8001, 10_000, 60_000])
def test_a_picture_that_claims_too_many_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """It is refused for its header: nothing of it is decoded."""
    path = tiny(tmp_path, pictures=[claiming(side)], labels=[0])
    decoded: list[Any] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded.append)
    assert "pixels" in refusal(path)
    assert not decoded


@pytest.mark.parametrize("where", ["within", "across"])
def test_pictures_of_two_sizes_are_refused(tmp_path: Path, where: str) -> None:
    sizes = [(6, 5), (6, 4)] if where == "within" else [(7, 5), (7, 5)]
    pictures = [encoded(np.zeros(size, dtype=np.uint8)) for size in sizes]
    message = refusal(tiny(tmp_path, pictures=pictures, labels=[1, 0]))
    got = "got 4x6 after 5x6" if where == "within" else "got 5x6 after 5x7"
    assert f"all pictures must share one size, {got}" in message


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    name = tiny(tmp_path)
    for path in tmp_path.rglob("train*.parquet"):
        path.write_bytes(path.read_bytes()[:200])
    assert "expected a data set in this directory, got: " in refusal(name)


def test_an_empty_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(2)})
    empty = datasets.Dataset.from_dict({"img": [], "label": []}, features=features)
    splits = datasets.DatasetDict({"train": empty, "test": empty})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: splits)
    assert refusal("owner/name") == "owner/name train: expected at least one row, got none"


def decoded_at(path: Path, column: str, rows: int) -> torch.Tensor:
    """The first pictures of a parquet file, read past the library: (rows, H, W[, 3]) uint8."""
    cells = pq.read_table(path, columns=[column]).slice(0, rows)[column].to_pylist()
    pictures = [np.array(PIL.Image.open(io.BytesIO(cell["bytes"]))) for cell in cells]
    return torch.from_numpy(np.stack(pictures))


def timed(action: Callable[[], Dataset]) -> tuple[Dataset, float]:
    began = time.process_time()
    return action(), time.process_time() - began


@pytest.mark.slow
@shared
def test_shared_mnist_is_quick_and_begins_with_the_digits() -> None:
    load_data("digits")
    mnist, seconds = timed(lambda: load_data(str(SHARED / "ylecun" / "mnist")))
    digits = load_data("digits")
    assert mnist.train_images.shape == (60000, 1, 28, 28)
    assert mnist.test_images.shape == (10000, 1, 28, 28)
    first = mnist.subset(6000, 1000)
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(first, part), getattr(digits, part))
    assert seconds < 15


@pytest.mark.slow
@shared
def test_shared_cifar10_is_pixel_equal() -> None:
    folder = SHARED / "uoft-cs" / "cifar10"
    cifar = load_data(str(folder))
    assert cifar.train_images.shape == (50000, 3, 32, 32)
    assert cifar.test_images.shape == (10000, 3, 32, 32)
    wanted = decoded_at(next(folder.rglob("train-*.parquet")), "img", 500).permute(0, 3, 1, 2)
    assert torch.equal(cifar.train_images[:500], wanted)
    assert cifar.train_labels.bincount().tolist() == [5000] * 10
    # The mean of CIFAR-10 as it is known from the literature.
    mean = cifar.train_images.float().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)


@pytest.mark.slow
@shared
def test_shared_cifar100_has_its_hundred_classes() -> None:
    cifar = load_data(str(SHARED / "uoft-cs" / "cifar100"))
    assert cifar.classes == 100
    assert cifar.train_labels.bincount().tolist() == [120] * 100
    assert cifar.test_images.shape == (2000, 3, 32, 32)


@pytest.mark.slow
@shared
def test_shared_photographs_have_no_labels() -> None:
    assert "expected a label" in refusal(str(SHARED / "BSDS500" / "images"))
