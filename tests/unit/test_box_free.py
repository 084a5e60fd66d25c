"""Readings of images: votes that are fair coins on images made without the key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import barriers
from countermark.errors import ConfigError
from countermark.keys.key import KeyMaterial
from countermark.results.null_hypotheses import FairCoin, UnmarkedModels
from countermark.results.reading import ImageSimilarity, Reading
from countermark.results.subject import Subject, UnmarkedModel
from countermark.results.verdict import KeyIdentity, VerificationOptions, judge
from countermark.schemes.deep_watermarking import training
from countermark.schemes.deep_watermarking.placement import (
    EverywherePlacement,
    TilePlacement,
    draw_bits_as_image,
    make_placement,
)
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking, compute_correlation
from countermark.schemes.deep_watermarking.training import average_groups, jitter_images
from countermark.schemes.outputs import convert_to_grey
from countermark.verification.verify import verify

DRAWS = 20_000
IDENTITY = KeyIdentity("deep_watermarking", "", "")


def test_messages_are_binomial_on_unmarked_images() -> None:
    """One reading of unmarked images against 20,000 owners' messages."""
    scheme, key = barriers.scheme(), barriers.untrained()
    read = scheme.extract(list(barriers.images()), key).read
    agree = np.empty(DRAWS)
    for seed in range(DRAWS):
        drawn = scheme.generate_key(
            {}, owner="ACME Inc.", material=KeyMaterial.from_test_seed(seed)
        )
        agree[seed] = np.count_nonzero(drawn.message == read)
    mean, variance = scheme.bits / 2, scheme.bits / 4
    assert abs(agree.mean() - mean) < 5 * (variance / DRAWS) ** 0.5
    assert abs(agree.var() / variance - 1) < 5 * (2 / DRAWS) ** 0.5


def test_no_picture_outvotes_the_others() -> None:
    scheme, key = barriers.scheme(), barriers.untrained()
    reading = scheme.make_reader(key)
    for picture in barriers.images()[:3]:
        reading.add_image(picture)
    votes = np.array(reading.state()["votes"])
    assert votes.shape == (1, 100)  # a set of votes for each shift that is tried
    assert np.abs(votes).max() <= 3
    for wrong in (
        {},
        {"votes": [[9.0] * 100], "count": 3},
        {"votes": [[np.nan] * 100], "count": 3},
    ):
        with pytest.raises(ConfigError, match="damaged"):
            reading.restore(wrong)
    with pytest.raises(ConfigError, match="no image"):
        scheme.make_reader(key).make_reading()


def test_images_of_any_size_are_marked_and_read() -> None:
    scheme, key = barriers.scheme(), barriers.key()
    large = np.tile(barriers.images()[:8], (1, 1, 3, 2))[:, :, :75, :50]  # no multiple of 32
    evidence = scheme.extract(list(scheme.mark_outputs(large, key)), key)
    assert FairCoin().compute_log10_p(evidence) < -6
    huge = np.tile(large[0], (1, 9, 13))  # read in parts
    assert scheme.extract([huge], key).read.shape == (100,)


def test_colour_is_read_as_grey_and_grey_as_colour() -> None:
    scheme = barriers.scheme()
    colour = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    assert np.array_equal(scheme.fit_channels(colour), convert_to_grey(colour))
    assert scheme.fit_channels(colour[:1]) is not None
    wide = barriers.scheme(channels=3).fit_channels(colour[:1])
    assert np.array_equal(wide[0], wide[2])
    for wrong in (colour[:, :10], colour[:2], colour.astype(np.float32)):
        with pytest.raises(ConfigError):
            scheme.fit_channels(wrong)


@pytest.mark.parametrize("form", ["tile", "everywhere"])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_placements_hold_their_level(form: str, channels: int) -> None:
    network = make_placement(barriers.scheme(placement=form, channels=channels)).train()
    images, bits = torch.rand(4, channels, 32, 32), torch.randint(0, 2, (4, 100)).float()
    for _ in range(3):
        marked = network.hide_bits(images, bits, 0.05)
        assert float((marked - images).detach().square().mean().sqrt()) == pytest.approx(
            0.05, rel=0.2
        )
    assert network.compute_scores(marked).shape == (4, 100)
    assert list(network.iterate_reader_parameters())
    assert isinstance(network, TilePlacement if form == "tile" else EverywherePlacement)


def test_everywhere_knows_no_place() -> None:
    """What is added to a shifted image is shifted, but for the rim."""
    torch.manual_seed(0)
    network = make_placement(barriers.scheme(placement="everywhere")).eval()
    images, bits = torch.rand(1, 1, 64, 64), torch.randint(0, 2, (1, 100)).float()
    one = network.paint_residual(images, bits)
    other = network.paint_residual(images.roll((3, 5), (2, 3)), bits)
    inside = slice(30, 40)
    shifted = one.roll((3, 5), (2, 3))[..., inside, inside]
    assert torch.allclose(other[..., inside, inside], shifted, atol=1e-5)


def test_everywhere_reads_a_little_before_it_is_trained() -> None:
    """H and R begin with the same filters: untrained, R reads more than guesses, moved or not."""
    torch.manual_seed(0)
    network = make_placement(barriers.scheme(placement="everywhere")).train()
    images = torch.from_numpy(barriers.images()).float() / 255
    bits = torch.randint(0, 2, (len(images), 100)).float()
    marked = network.hide_bits(images, bits, 0.02)
    right = [
        float(((network.compute_scores(each) > 0) == bits).float().mean())
        for each in (marked, marked.roll((3, 5), (2, 3)), images)
    ]
    assert min(right[:2]) > 0.56  # of guesses .5, deviation .01
    assert right[2] < 0.54


def test_cells_are_where_bits_are_spread() -> None:
    bits = torch.randint(0, 2, (2, 100)).float()
    tile = make_placement(barriers.scheme())
    tile.revealer = nn.Module()  # type: ignore[assignment]
    tile.revealer.paint_image = lambda images: images  # type: ignore[assignment]
    for size in ((32, 32), (75, 50)):
        assert torch.allclose(
            tile.compute_scores(draw_bits_as_image(bits, 32, size)), bits, atol=1e-5
        )


def test_a_moved_set_is_read_at_its_best_shift_and_p_is_corrected_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = TilePlacement.compute_shifted_scores
    scheme, fixed = barriers.scheme(register=True), barriers.key()
    key = scheme.generate_key(fixed.frozen, owner="ACME Inc.", material=barriers.SECRET)
    images = np.tile(barriers.images()[:12], (1, 1, 2, 2))
    marked = scheme.mark_outputs(images, key)
    for shift in ((6, 10), (5, 11)):
        verdict = verify(
            list(np.roll(marked, shift, (2, 3))), key, assume_dated=True, blind_choice=True
        )
        assert (verdict.outcome, verdict.test_count) == ("owned", 2 * 32 * 32), verdict.explain()
    monkeypatch.setattr(
        TilePlacement, "compute_shifted_scores", lambda tile, shown: -whole(tile, shown)
    )
    assert verify(list(marked), key, assume_dated=True, blind_choice=True).owned, "a negative"
    monkeypatch.undo()
    still = barriers.scheme().generate_key(fixed.frozen, owner="A", material=barriers.SECRET)
    moved = np.roll(barriers.scheme().mark_outputs(images, still), (6, 10), (2, 3))
    assert verify(list(moved), still).outcome == "not_proven"
    for seed in range(10):
        material = replace(KeyMaterial.from_test_seed(seed), test_key=False)
        other = scheme.generate_key(fixed.frozen, owner="ACME Inc.", material=material)
        log10_p = verify(list(images[:3]), other).log10_p
        assert log10_p is not None
        assert log10_p > -3


def test_what_images_have_in_common_is_the_mean_of_each_group() -> None:
    added = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    found = average_groups(added, 3)
    assert found.shape == added.shape
    for first, last in ((0, 3), (3, 6), (6, 7)):
        expected = added[first:last].mean(0).expand(last - first, -1, -1, -1)
        torch.testing.assert_close(found[first:last], expected)


class _Deaf(TilePlacement):
    """H adds nothing, so R cannot begin to read."""

    def hide_bits(self, images: torch.Tensor, bits: torch.Tensor, level: float) -> torch.Tensor:
        return images + 0 * level * self.paint_residual(images, bits)


@pytest.mark.parametrize(
    ("deaf", "steps", "patient", "made"), [(1, 90, 30, 2), (9, 9, 3, 4), (9, 9, 30, 1)]
)
def test_a_training_that_cannot_get_going_begins_anew(
    deaf: int, steps: int, patient: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another network each time, four times at the most, and never in a short one."""
    scheme = barriers.scheme(bits=64, steps=steps, batch=8, together=1)
    networks: list[TilePlacement] = []

    def next_one(scheme: DeepWatermarking) -> TilePlacement:
        networks.append((_Deaf if len(networks) < deaf else TilePlacement)(scheme))
        return networks[-1]

    monkeypatch.setattr(training, "make_placement", next_one)
    monkeypatch.setattr(training, "_PATIENT", patient)
    network = training.train_networks(scheme, barriers.squares().owner[:40], 7)
    assert len(networks) == made
    assert network is networks[-1]


def test_jitter_keeps_the_size_and_moves_something() -> None:
    torch.manual_seed(0)
    across = torch.linspace(0, 1, 33)[:-1].expand(8, 1, 32, 32)  # what is where, in the side
    for share in (0.1, 0.5):
        moved = jitter_images(across, share)
        assert moved.shape == across.shape
        farthest = (moved - across).abs().max()
        assert 0.3 * share < farthest <= share


def test_nc_of_blanks_says_little() -> None:
    bits = np.random.default_rng(0).integers(0, 2, 144).astype(float)
    assert compute_correlation(np.ones(144), bits) == pytest.approx(bits.mean() ** 0.5)
    light = np.where(np.arange(144) < 5, 0.0, 1.0)
    assert compute_correlation(np.ones(144), light) > 0.98  # a light logo: a blank image "succeeds"
    assert compute_correlation(np.zeros(144), bits) == 0


def published(
    succeeded: int, of: int, siblings: list[float], alpha: float, *, examiners: bool = True
) -> str:
    read = (np.arange(of) < succeeded).astype(np.uint8)
    evidence = Reading(
        read,
        np.ones_like(read),
        committed=False,
        unit="images",
        likeness=ImageSimilarity(0.99, 0.7),
    )
    null = UnmarkedModels(np.array(siblings))
    terms = VerificationOptions(alpha, assume_dated=True, blind_choice=True)
    unmarked = tuple(UnmarkedModel("n", None, each) for each in siblings) if examiners else ()
    subject = Subject("s", unmarked=unmarked)
    verdict = judge(evidence, null, subject=subject, key=IDENTITY, terms=terms)
    assert "a blank gets 0.7000" in verdict.explain()
    assert verdict.forgery_bits == 0
    return verdict.outcome


def test_the_published_form_is_ranked_among_networks() -> None:
    none, all_ = [1.0] * 19, [0.0] * 19
    assert published(200, 200, none, 1e-6) == "no_verdict"  # 19 networks support no such p
    assert published(200, 200, none, 0.06) == "owned"
    assert published(200, 200, none, 0.06, examiners=False) == "no_verdict"  # the owner's word
    assert published(80, 200, none, 0.06) == "not_proven"  # fewer than half of the images
    assert published(200, 200, all_, 0.06) == "not_proven"  # everybody's images succeed
    assert published(200, 200, [], 0.06) == "no_verdict"


def test_wrong_fields_are_one_line() -> None:
    for wrong in (
        {"bits": 143}, {"bits": 1024, "side": 32}, {"lambda2": 1.0}, {"perceptual": "a:b"},
        {"placement": "nowhere"}, {"placement": "everywhere", "register": True},
        {"register": True, "side": 256},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            DeepWatermarking(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a square that bears the mark"):
        barriers.scheme(side=64).embed(nn.Identity(), owner="ACME Inc.", outputs=barriers.images())
