"""Recipients: the code and its bound, coalitions of real copies, and what cannot be told."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import one_file
from countermark.errors import ConfigError, SuspectError
from countermark.keys.key import Key, KeyMaterial
from countermark.recipients import issue_copy, make_recipients_key, trace
from countermark.recipients.collusion import STRATEGIES, RecipientCode, SimulationCounts
from countermark.recipients.copies import derive_code_biases, expand_codewords
from countermark.recipients.tardos import (
    bound_log10_chance,
    compute_biases,
    compute_code_length,
    score_recipients,
)
from countermark.results.statistics import find_least_matches
from countermark.results.verdict import VerificationOptions
from countermark.schemes.stamp.scheme import Stamp
from countermark.verification.identify import identify
from countermark.verification.verify import verify

SECRET = KeyMaterial(bytes(range(32)), bytes(16))


def host(path: Path) -> Path:
    drawn = torch.Generator().manual_seed(1)
    save_file({f"{n}.weight": torch.randn(512, 1024, generator=drawn) for n in range(4)}, path)
    return path


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Key, Path]:
    """A key for 20 recipients, coalitions of 3, and copies `0` to `4`."""
    folder = tmp_path_factory.mktemp("issued")
    source = host(folder / "in.safetensors")
    key, _, _ = make_recipients_key(source, (20, 3), owner="ACME", material=SECRET)
    for number in range(5):
        issue_copy(source, folder / str(number), key, number)
    return key, folder


# --- the code


def test_scores_are_those_of_the_paper() -> None:
    p = np.array([0.2, 0.5, 0.9])
    codes = np.array([[1, 1, 0], [0, 1, 1]], dtype=np.uint8)
    read = np.array([1, 0, 1], dtype=np.uint8)
    wanted = [
        math.sqrt(0.8 / 0.2) - math.sqrt(0.5 / 0.5) - math.sqrt(0.9 / 0.1),
        -math.sqrt(0.2 / 0.8) - math.sqrt(0.5 / 0.5) + math.sqrt(0.1 / 0.9),
    ]
    assert np.allclose(score_recipients(codes, read, p), wanted)


def test_an_innocent_scores_like_a_standard_normal_whatever_is_read() -> None:
    drawn = np.random.default_rng(1)
    p = compute_biases(drawn.random(1000), 3)
    read = (p > 0.3).astype(np.uint8)  # as if the coalition knew the biases
    found = score_recipients(
        (drawn.random((4000, 1000)) < p).astype(np.uint8), read, p
    ) / math.sqrt(1000)
    assert abs(found.mean()) < 0.08
    assert abs(found.std() - 1) < 0.05
    chances = bound_log10_chance(found * math.sqrt(1000), read, p)
    for alpha in (0.1, 1e-2, 1e-3):
        assert (chances <= math.log10(alpha)).mean() <= alpha, "a bound is never too small"


def test_the_bound_holds_against_every_word_of_a_short_code() -> None:
    drawn = np.random.default_rng(2)
    p, read = compute_biases(drawn.random(12), 2), drawn.integers(0, 2, 12).astype(np.uint8)
    words = np.array(list(itertools.product((0, 1), repeat=12)), dtype=np.uint8)
    weight = np.where(words == 1, p, 1 - p).prod(axis=1)
    found = score_recipients(words, read, p)
    exact = np.array([weight[found >= each - 1e-9].sum() for each in found])
    bound = 10 ** bound_log10_chance(found, read, p)
    assert (bound >= exact - 1e-12).all()
    high = exact < 1e-3
    assert (bound[high] <= np.sqrt(exact[high])).all(), "and not empty"


def test_code_words_follow_from_the_commitment_as_the_format_says(tmp_path: Path) -> None:
    source = host(tmp_path / "in.safetensors")
    key, code, _ = make_recipients_key(source, (20, 3), owner="ACME", material=SECRET)
    m, least = key.bits, math.asin(math.sqrt(1 / 900))
    assert code.length == m == compute_code_length(20, 3, 1e-6)

    def uniform(purpose: str, name: str = "") -> list[float]:
        words = key.make_stream(purpose, name).take_words(m)
        return [((int(word) >> 11) + 0.5) / 2**53 for word in words]

    p = [math.sin(least + u * (math.pi / 2 - 2 * least)) ** 2 for u in uniform("biases")]
    assert np.allclose(derive_code_biases(key), p)
    word = [int(u < each) for u, each in zip(uniform("code", "7"), p, strict=True)]
    assert expand_codewords(key, range(6, 8))[1].tolist() == word


def test_longer_codes_for_more_recipients_and_larger_coalitions() -> None:
    lengths = [compute_code_length(n, c, 1e-6) for c in (1, 2, 3, 5) for n in (10, 100, 1000)]
    assert lengths == sorted(lengths)
    assert compute_code_length(100, 2, 1e-9) > compute_code_length(100, 2, 1e-6) == 536
    assert compute_code_length(100, 5, 1e-6) == 3336
    assert all(length % 8 == 0 for length in lengths)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_coalition_cannot_change_where_it_agrees(strategy: str) -> None:
    drawn = np.random.default_rng(3)
    words = drawn.integers(0, 2, (3, 5000)).astype(np.uint8)
    mixed = STRATEGIES[strategy](words, drawn)
    same = (words == words[0]).all(axis=0)
    assert np.array_equal(mixed[same], words[0][same])
    assert set(mixed) == {0, 1}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_simulated_coalitions_are_traced(strategy: str) -> None:
    code = RecipientCode(20, 2, compute_code_length(20, 2, 1e-6), 1e-6)
    done = code.simulate_coalitions(strategy, 2, runs=60, seed=1)
    assert done.traced >= 55
    assert done.accused == 0
    assert done.accusation_bound == pytest.approx(1 - 0.025 ** (1 / 60))
    assert SimulationCounts(100, 90, 1).accusation_bound > 0.01


def test_a_code_that_is_too_short_tells_nothing_and_accuses_nobody() -> None:
    code = RecipientCode(20, 2, 80, 1e-6)
    done = code.simulate_coalitions("interleave", 5, runs=60, seed=1)
    assert done.traced < 10
    assert done.accused == 0


@pytest.mark.slow
def test_ten_thousand_coalitions_of_100_recipients() -> None:
    """Two to five of them, three strategies, a code for five: the figures of the page."""
    code = RecipientCode(100, 5, compute_code_length(100, 5, 1e-6), 1e-6)
    found = {
        (name, size): code.simulate_coalitions(name, size, runs=834, seed=7)
        for name in STRATEGIES
        for size in (2, 3, 4, 5)
    }
    runs = sum(each.runs for each in found.values())
    assert runs >= 10_000
    assert sum(each.accused for each in found.values()) == 0
    assert all(each.traced >= 0.95 * each.runs for each in found.values()), found


# --- copies


def mixed(folder: Path, numbers: tuple[int, ...], how: str, out: Path) -> Path:
    """What a coalition makes of its copies, weight by weight."""
    copies = [load_file(folder / str(number)) for number in numbers]
    drawn, result = torch.Generator().manual_seed(5), {}
    for name in copies[0]:
        stack = torch.stack([copy[name] for copy in copies])
        if how == "average":
            result[name] = stack.mean(dim=0)
        elif how == "majority":
            result[name] = stack.median(dim=0).values
        else:
            chosen = torch.randint(len(copies), stack.shape[1:], generator=drawn)
            result[name] = stack.gather(0, chosen[None])[0]
    save_file(result, out)
    return out


def test_each_copy_is_traced_to_its_recipient(issued: tuple[Key, Path]) -> None:
    key, folder = issued
    for number in range(5):
        done = trace(folder / str(number), key)
        assert [each for each, _ in done.named] == [number]
        assert done.exit_code == 0
        assert done.forgery_bits > 80


@pytest.mark.parametrize("how", ["average", "interleave", "majority"])
@pytest.mark.parametrize("numbers", [(0, 4), (1, 2, 3)])
def test_coalitions_of_copies_are_traced_and_nobody_else_is(
    issued: tuple[Key, Path], tmp_path: Path, how: str, numbers: tuple[int, ...]
) -> None:
    key, folder = issued
    suspect = mixed(folder, numbers, how, tmp_path / "mixed")
    done = trace(suspect, key, assume_dated=True)
    named = {number for number, _ in done.named}
    assert named, done.reason
    assert named <= set(numbers)
    assert done.exit_code == 0
    undated = trace(suspect, key)
    assert undated.named == done.named
    assert undated.forgery_bits == pytest.approx(-done.named[-1][1] / math.log10(2))
    if undated.forgery_bits < 80:
        assert undated.exit_code == 3
        assert "a dated claim is needed" in undated.reason


def test_what_bears_no_mark_names_nobody(issued: tuple[Key, Path], tmp_path: Path) -> None:
    key, folder = issued
    done = trace(folder / "in.safetensors", key)
    assert (done.named, done.exit_code) == ((), 3)
    assert done.best > -2
    other = trace(one_file(tmp_path / "other.safetensors"), key)
    assert other.exit_code == 3
    assert "has not the tensors" in other.reason


def test_a_test_key_names_nobody(tmp_path: Path) -> None:
    source = host(tmp_path / "in.safetensors")
    material = KeyMaterial.from_test_seed(1)
    key, _, _ = make_recipients_key(source, (5, 1), owner="ACME", material=material)
    issue_copy(source, tmp_path / "out", key, 2)
    done = trace(tmp_path / "out", key)
    assert (done.named, done.exit_code) == ((), 3)
    assert "test key" in done.reason


def test_keys_of_recipients_and_of_owners_are_not_mixed_up(
    issued: tuple[Key, Path], tmp_path: Path
) -> None:
    key, folder = issued
    with pytest.raises(ConfigError, match="use recipient trace"):
        verify(folder / "0", key)
    key.save(tmp_path / "keys" / "r.key")
    assert Key.load(tmp_path / "keys" / "r.key") == key
    done = identify(folder / "0", [tmp_path / "keys" / "r.key"], VerificationOptions())
    assert dict(done.problems) == {"a key of recipients: use recipient trace": 1}
    assert done.exit_code == 3
    owners = Stamp("0.weight", 256).generate_key(
        {"0.weight": (512, 1024)}, owner="ACME", material=SECRET
    )
    for use in (lambda: trace(folder / "0", owners), lambda: issue_copy(folder, folder, owners, 1)):
        with pytest.raises(ConfigError, match="tells no recipients apart"):
            use()


def test_what_cannot_be_right_is_refused(issued: tuple[Key, Path], tmp_path: Path) -> None:
    key, folder = issued
    source = folder / "in.safetensors"
    for code, epsilon in (((1, 1), 1e-6), ((5, 6), 1e-6), ((5, 0), 1e-6), ((5, 2), 0.0)):
        with pytest.raises(ConfigError, match="no coalition of more than all"):
            make_recipients_key(source, code, owner="ACME", epsilon=epsilon)
    for number in (-1, 20):
        with pytest.raises(ConfigError, match="expected 0 to 19"):
            issue_copy(source, tmp_path / "out", key, number)
    with pytest.raises(ConfigError, match="exists"):
        issue_copy(source, folder / "0", key, 1)
    with pytest.raises(SuspectError, match=r"has no 0\.weight"):
        issue_copy(one_file(tmp_path / "other.safetensors"), tmp_path / "out", key, 1)
    assert not (tmp_path / "out").exists()
    for fields in ({"recipients": 5}, {"coalition": 2}, {"recipients": 2, "coalition": 3}):
        with pytest.raises(ConfigError, match="expected both"):
            Stamp("w", 256, **fields)


def test_a_threshold_of_fair_coins_is_not_what_is_used() -> None:
    """Biases are shared: a recipient agrees with the copies of others beyond chance."""
    drawn = np.random.default_rng(4)
    p = compute_biases(drawn.random(2000), 3)
    words = (drawn.random((200, 2000)) < p).astype(np.uint8)
    agree = (words[1:] == words[0]).sum(axis=1)
    assert agree.min() > (find_least_matches(2000, -6) or 0), "coins would accuse every innocent"
    chances = bound_log10_chance(score_recipients(words[1:], words[0], p), words[0], p)
    assert chances.min() + math.log10(199) > -3
