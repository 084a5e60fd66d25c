"""Identify a suspect: try many keys, and correct p for all of them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from countermark._internal.progress import show_progress
from countermark.checkpoints import (
    MOST_CANDIDATES,
    CachedWeights,
    Weights,
    open_suspect,
    open_weights,
)
from countermark.errors import ConfigError, CountermarkError, KeyFileError
from countermark.keys.key import Key
from countermark.keys.storage import load_header, load_key
from countermark.results import statistics
from countermark.results.verdict import NoTruthValue, Verdict, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.weights import WeightScheme
from countermark.verification.verify import examine

MOST_KEYS = 1_000_000
# A batch is large enough that opening the suspect again for each batch costs little.
_AT_ONCE = 250  # keys that a process is given at a time
# Each process holds its own copy of the suspect's tensors, so more would need more memory.
_PROCESSES = 2


@dataclass(frozen=True)
class KeyAttempt:
    """The result of trying one key.

    Attributes:
        folder: folder of the key.
        matched, bits: number of matching bits in the best reading, and of expected bits.
        tests: number of readings that were tried.
        problem: why the key could not be tried; empty if it was tried.
    """

    folder: str
    matched: int = 0
    bits: int = 0
    tests: int = 0
    problem: str = ""

    @property
    def log10_p(self) -> float:
        """log10 of p by fair coins, corrected for the readings of this key."""
        tail = statistics.compute_log10_binomial_tail(self.matched, self.bits)
        return min(0.0, tail + math.log10(self.tests))


@dataclass(frozen=True)
class Identification(NoTruthValue):
    """The answer about one suspect and many keys.

    Attributes:
        suspect: name of the suspect.
        found: folder and verdict of each key whose p is small enough, the smallest p first.
        tried: number of keys that were tried.
        best: the smallest log10 p after correction; None if no key was tried.
        problems: reasons why other keys could not be tried, with the number of keys for each.
    """

    ask: ClassVar[str] = "identified.found"

    suspect: str
    found: Mapping[str, Verdict]
    tried: int
    best: float | None
    problems: Mapping[str, int]

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 a mark is present, 1 no mark found, 3 cannot tell."""
        if any(verdict.owned for verdict in self.found.values()):
            return 0
        return 3 if self.found or self.problems else 1

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {
            "suspect": self.suspect,
            "found": {folder: verdict.to_json() for folder, verdict in self.found.items()},
            "tried": self.tried,
            "best_log10_p": self.best,
            "problems": dict(self.problems),
        }


def identify(
    suspect: Path,
    folders: Sequence[Path],
    terms: VerificationOptions,
    *,
    passphrase: str | None = None,
) -> Identification:
    """Try keys on a suspect, which is read once, and judge the keys that find their marks.

    Args:
        suspect: a weight file, or a folder of shards.
        folders: key folders.
        terms: thresholds and statements; alpha is for all keys together (Holm).
        passphrase: passphrase of encrypted keys.

    Raises:
        SuspectError: the suspect cannot be read.
    """
    with open_weights(suspect) as weights:
        name = weights.name
    outcomes = list(_try_all_keys(suspect, folders, passphrase))
    # Keys that could not be tried are no tests: they do not enter the correction.
    tried = [each for each in outcomes if not each.problem]
    problems = Counter(each.problem for each in outcomes if each.problem)
    tried.sort(key=lambda each: each.log10_p)
    adjusted = statistics.adjust_by_holm([each.log10_p for each in tried])
    found = {}
    for rank, (each, log10_p) in enumerate(zip(tried, adjusted, strict=True)):
        # The adjusted values never decrease with the rank: after the first failure all others fail.
        if log10_p > math.log10(terms.alpha):
            break
        # Keys are loaded again instead of kept: a million keys would not fit into memory.
        key = load_key(Path(each.folder), _choose_passphrase(Path(each.folder), passphrase))
        found[each.folder] = examine(suspect, key, replace(terms, keys=len(tried) - rank))
    return Identification(name, found, len(tried), min(adjusted, default=None), problems)


def list_key_folders(folder: Path) -> list[Path]:
    """List the key folders directly in a folder, or the folder itself if it is a key.

    Raises:
        ConfigError: there is no key folder, or there are more than a million.
    """
    if (folder / "key.json").exists():
        return [folder]
    try:
        inside = sorted(each for each in folder.iterdir() if (each / "key.json").exists())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}): expected keys") from None
    if not 1 <= len(inside) <= MOST_KEYS:
        raise ConfigError(
            f"{folder} holds {len(inside):,} keys: expected a folder with 1 to {MOST_KEYS:,}"
        )
    return inside


def _try_all_keys(
    suspect: Path, folders: Sequence[Path], passphrase: str | None
) -> Iterator[KeyAttempt]:
    """Try every key, in two processes if there are many keys, and yield the results in order."""
    parts = [folders[at : at + _AT_ONCE] for at in range(0, len(folders), _AT_ONCE)]
    processes = min(_PROCESSES, os.cpu_count() or 1, len(parts))
    with show_progress("keys", len(folders)) as advance:
        if processes == 1:
            for part in parts:
                yield from _try_keys(suspect, part, passphrase)
                advance(len(part))
            return
        # Spawned, not forked: a fork copies locks that other threads of the caller may hold.
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            work = [pool.submit(_try_keys_in_worker, suspect, part, passphrase) for part in parts]
            for part, done in zip(parts, work, strict=True):
                yield from done.result()
                advance(len(part))


def _try_keys_in_worker(
    suspect: Path, folders: Sequence[Path], passphrase: str | None
) -> list[KeyAttempt]:
    """Try a batch of keys in a worker process."""
    return list(_try_keys(suspect, folders, passphrase))


def _try_keys(
    suspect: Path, folders: Sequence[Path], passphrase: str | None
) -> Iterator[KeyAttempt]:
    """Try keys on a suspect that is opened once for all of them."""
    with CachedWeights(open_suspect(suspect)) as weights:
        for folder in folders:
            try:
                key = load_key(folder, _choose_passphrase(folder, passphrase))
                yield _try_key(weights, key, str(folder))
            # One damaged key among a million must not end the run: the reason is counted instead.
            except KeyFileError:
                yield KeyAttempt(
                    str(folder), problem="damaged, or encrypted with another passphrase"
                )
            except CountermarkError:
                yield KeyAttempt(str(folder), problem="not to be read as it is: ask verify why")


def _choose_passphrase(folder: Path, passphrase: str | None) -> str | None:
    """Return the passphrase for an encrypted key, and None for a key that is not encrypted."""
    return passphrase if passphrase and load_header(folder).encryption else None


def _try_key(weights: Weights, key: Key, folder: str) -> KeyAttempt:
    """Try one key and return its best reading.

    Args:
        weights: the suspect, opened.
        key: the key.
        folder: folder of the key, for the result.
    """
    scheme = load_scheme(key)
    if not isinstance(scheme, WeightScheme) or not scheme.linear:
        return KeyAttempt(folder, problem=f"a key of {key.scheme}, which reads by no linear rule")
    # Bits of a recipient code are biased, so fair coins do not give their probability.
    if key.fields.get("recipients"):
        return KeyAttempt(folder, problem="a key of recipients: use recipient trace")
    weights, tried = scheme.locate_tensors(weights, key)
    if not 1 <= len(tried) <= MOST_CANDIDATES:
        return KeyAttempt(folder, problem="its tensors are not in the suspect, or in too many ways")
    # Bits alone are compared here: decoding the payload is slow and changes no probability.
    matched = max(
        int(
            np.count_nonzero(
                scheme.read_bits(scheme.read_suspect_tensors(weights, where, key), key)
                == key.message
            )
        )
        for where in tried
    )
    return KeyAttempt(folder, matched, key.bits, len(tried))
