"""The rows that a host learns DeepStego's mark from: loud first, then beside what is no mark."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from countermark.keys.key import KeyMaterial
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.deepstego.training import DeepStegoTraining
from countermark.schemes.triggers import TRIGGERS
from countermark.training.data import load_data

WARM_UP, COUNT = 10, 64
SCHEME = DeepStego(
    classes=10,
    triggers=20,
    psnr=30.0,
    stego_steps=5,
    foreign=1,
    strength=5.0,
    warm_up=WARM_UP,
    pool=200,
)


@pytest.fixture(scope="module")
def covers() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    return data.train_images[:300], data.train_labels[:300]


def started(covers: tuple[Tensor, Tensor]) -> DeepStegoTraining:
    material = KeyMaterial.from_test_seed(4)
    frozen = DeepStegoTraining.make_pre_commit_tensors(SCHEME, material, *covers)
    key = SCHEME.generate_key(frozen, owner="ACME", material=material)
    return DeepStegoTraining(SCHEME, key, *covers)


@pytest.fixture(scope="module")
def mixed(covers: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    training = started(covers)
    return [training.make_rows(COUNT) for _ in range(2 * WARM_UP)]


def nearest(images: Tensor, covers: Tensor) -> tuple[Tensor, Tensor]:
    """Which cover each image is made of, and how far it is from it (root mean square)."""
    apart = torch.cdist(images.flatten(1).double(), covers.flatten(1).double())
    far, which = apart.min(dim=1)
    return which, far / covers[0].numel() ** 0.5


def test_the_first_triggers_are_loud_and_the_last_have_the_schemes_psnr(
    mixed: list[tuple[Tensor, Tensor]], covers: tuple[Tensor, Tensor]
) -> None:
    def loudness(rows: Tensor) -> float:
        """Of fresh triggers, which follow upon the committed ones."""
        fresh = rows[COUNT // 8 : COUNT // 8 + 20]
        return float(nearest(fresh, covers[0])[1].mean())

    final = 255 * 10 ** (-SCHEME.psnr / 20)
    last = loudness(mixed[-1][0])
    assert 0.7 * final < last < 1.1 * final
    assert 2.5 < loudness(mixed[0][0]) / last < 6
    assert loudness(mixed[0][0]) > loudness(mixed[5][0]) > last


def test_eight_bit_triggers_have_the_schemes_psnr(covers: tuple[Tensor, Tensor]) -> None:
    frozen = DeepStegoTraining.make_pre_commit_tensors(
        SCHEME, KeyMaterial.from_test_seed(6), *covers
    )
    _, far = nearest(torch.from_numpy(frozen[TRIGGERS]), covers[0])
    psnr = -20 * torch.log10(far.square().mean().sqrt() / 255)
    assert 29.8 < psnr < 30.8, "20 triggers, scaled on all covers"


def test_what_is_no_mark_comes_late_and_with_its_true_label(
    mixed: list[tuple[Tensor, Tensor]], covers: tuple[Tensor, Tensor]
) -> None:
    training = started(covers)
    mapped = torch.from_numpy(SCHEME.draw_class_map(training.key))

    def shares(batch: tuple[Tensor, Tensor]) -> tuple[int, int, int]:
        images, labels = batch[0][COUNT // 8 :], batch[1][COUNT // 8 :]
        which, far = nearest(images, covers[0])
        true = covers[1][which]
        is_mapped = labels == mapped[true]
        assert bool((is_mapped | (labels == true)).all())
        covered = far == 0
        assert not bool((is_mapped & covered).any()), "a plain cover has its true label"
        altered = (labels == true) & ~covered
        return int(is_mapped.sum()), int(covered.sum()), int(altered.sum())

    assert shares(mixed[0]) == (28, 28, 0)
    triggers, plain, altered = shares(mixed[-1])
    assert (triggers, plain) == (34, 6)
    assert altered == 16


def test_committed_triggers_come_with_their_secret_labels(
    mixed: list[tuple[Tensor, Tensor]], covers: tuple[Tensor, Tensor]
) -> None:
    key = started(covers).key
    images, labels = mixed[3][0][: COUNT // 8], mixed[3][1][: COUNT // 8]
    triggers = torch.from_numpy(np.array(SCHEME.read_committed_triggers(key)))
    for image, label in zip(images, labels, strict=True):
        found = (triggers == image).flatten(1).all(dim=1)
        assert int(label) in SCHEME.derive_labels(key)[found.numpy()]


def test_rows_go_on_where_they_were_interrupted(covers: tuple[Tensor, Tensor]) -> None:
    whole, first = started(covers), started(covers)
    before = [whole.make_rows(COUNT) for _ in range(12)]
    for _ in range(9):
        first.make_rows(COUNT)
    second = started(covers)
    second.restore(first.export_state())
    for expected in before[9:]:
        images, labels = second.make_rows(COUNT)
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
