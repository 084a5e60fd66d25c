"""Corrections: each freedom multiplies p, and is named in the text and in the JSON."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from countermark.claims.decision import Decision
from countermark.claims.dispute import DisputeDecision
from countermark.errors import ConfigError
from countermark.recipients.copies import TraceResult
from countermark.results.key_dating import KeyDating
from countermark.results.null_hypotheses import FairCoin, SecretLabels
from countermark.results.reading import Disclosure, ImageSimilarity, Reading
from countermark.results.subject import Subject
from countermark.results.test_result import CORRECTIONS, Freedoms, TestResult, list_corrections
from countermark.results.verdict import KeyIdentity, Verdict, VerificationOptions, judge
from countermark.verification.dispute import READINGS, make_dispute_options
from countermark.verification.identify import Identification

KEY, SUBJECT = KeyIdentity("uchida", "00" * 32, "ACME Inc."), Subject("suspect")
SOURCE = Path(__file__).parents[2] / "src" / "countermark"


def evidence(**more: Any) -> Reading:
    bits = np.zeros(200, np.uint8)
    return Reading(bits, bits, **more)


def dating(commitments: int) -> KeyDating:
    return KeyDating(
        "ab" * 32, "2026-06-01T00:00:00Z", "2026-05-01T00:00:00Z", ("CN=A",), commitments,
        "pinned", None,
    )  # fmt: skip


FREEDOMS: dict[str, tuple[Subject, VerificationOptions, int]] = {
    "readings tried": (replace(SUBJECT, readings=7), VerificationOptions(), 7),
    "orders of class names": (replace(SUBJECT, class_names=10), VerificationOptions(), 3_628_800),
    "keys tried": (SUBJECT, VerificationOptions(keys=40), 40),
    "readings of the dispute": (SUBJECT, VerificationOptions(dispute_readings=6), 6),
    "claims counted": (SUBJECT, VerificationOptions(dating=dating(25)), 25),
}


@pytest.mark.parametrize("name", FREEDOMS)
def test_each_correction_reaches_p_and_text_and_json(name: str) -> None:
    subject, terms, factor = FREEDOMS[name]
    plain = judge(evidence(), FairCoin(), subject=SUBJECT, key=KEY, terms=VerificationOptions())
    found = judge(evidence(), FairCoin(), subject=subject, key=KEY, terms=terms)
    assert plain.log10_p is not None
    assert found.log10_p == pytest.approx(plain.log10_p + math.log10(factor))
    assert found.to_json()["corrections"] == [{"name": name, "factor": factor}]
    assert json.loads(json.dumps(found.to_json()))["log10_p"] == found.log10_p
    assert f"p is multiplied by {factor:,}: {factor:,} {name}" in found.explain()
    assert "not corrected" in plain.explain()
    assert plain.to_json()["corrections"] == []


def test_all_corrections_multiply() -> None:
    subject = replace(SUBJECT, readings=3, class_names=3)
    terms = VerificationOptions(keys=5, dispute_readings=6, claims=2, dating=dating(7))
    found = judge(evidence(), FairCoin(), subject=subject, key=KEY, terms=terms)
    assert found.result is not None
    assert found.result.factor == 3 * 6 * 5 * 6 * 14
    assert [each.name for each in found.result.corrections] == [
        name for name in CORRECTIONS if name != "candidates"
    ]
    assert found.test_count == found.result.key_factor == 3 * 6 * 5
    assert found.forgery_bits == pytest.approx(200 - math.log2(90))


def test_a_correction_decides_between_owned_and_not_proven() -> None:
    """Twenty bits more than alpha needs, and orders of names that take them."""
    bits = np.zeros(26, np.uint8)
    short = Reading(bits, bits, choices=2)
    dated = VerificationOptions(assume_dated=True)
    plain = judge(short, FairCoin(), subject=SUBJECT, key=KEY, terms=dated)
    named = judge(short, FairCoin(), subject=replace(SUBJECT, class_names=10), key=KEY, terms=dated)
    assert plain.owned
    assert not named.owned


def test_the_floor_is_corrected_as_p_is() -> None:
    bits = np.zeros(20, np.uint8)
    found = judge(
        Reading(bits, bits), FairCoin(), subject=replace(SUBJECT, readings=2), key=KEY,
        terms=VerificationOptions(assume_dated=True),
    )  # fmt: skip
    assert "this key cannot prove anything here" in found.reason


def test_a_blind_choice_takes_the_orders_of_names_away_and_nothing_else() -> None:
    subject = replace(SUBJECT, class_names=10, readings=3)
    stated = VerificationOptions(blind_choice=True)
    found = judge(evidence(), SecretLabels(), subject=subject, key=KEY, terms=stated)
    assert [each["name"] for each in found.to_json()["corrections"]] == ["readings tried"]
    opened = evidence(disclosure=Disclosure(50, 200, blind_choice=True))
    found = judge(opened, SecretLabels(), subject=subject, key=KEY, terms=stated)
    assert {each["name"] for each in found.to_json()["corrections"]} == {
        "readings tried", "orders of class names"
    }  # fmt: skip


def test_more_names_than_orders_can_be_counted_are_refused() -> None:
    assert list_corrections(replace(SUBJECT, class_names=14), Freedoms())
    with pytest.raises(ConfigError, match="at most 14"):
        list_corrections(replace(SUBJECT, class_names=15), Freedoms())
    many = replace(SUBJECT, class_names=1 << 39)
    assert list_corrections(many, Freedoms(class_orders=False)) == ()


def test_the_six_readings_of_a_dispute_are_corrections() -> None:
    terms = make_dispute_options(1e-6, None)
    found = judge(evidence(), FairCoin(), subject=SUBJECT, key=KEY, terms=terms)
    assert found.to_json()["corrections"] == [
        {"name": "readings of the dispute", "factor": READINGS}
    ]
    assert found.alpha == 1e-6


# --- a misspelt field is an error of mypy


def fields_used() -> Iterator[tuple[int, int, str]]:
    """Place and name of each attribute that `list_corrections` and its callers read."""
    tree = ast.parse((SOURCE / "results" / "test_result.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "list_corrections":
            for each in ast.walk(node):
                held = each.value if isinstance(each, ast.Attribute) else None
                if isinstance(held, ast.Name) and held.id in {"subject", "freedoms"}:
                    yield each.lineno, each.end_col_offset, each.attr


def test_every_field_that_a_correction_uses_is_typed(tmp_path: Path) -> None:
    lines = (SOURCE / "results" / "test_result.py").read_text().splitlines(keepends=True)
    places = sorted(set(fields_used()))
    assert {name for _, _, name in places} == {
        "readings", "class_names", "class_orders", "keys", "dispute_readings", "claims"
    }  # fmt: skip
    mutants = []
    for number, (line, end, name) in enumerate(places):
        changed = list(lines)
        changed[line - 1] = f"{changed[line - 1][:end]}s_{changed[line - 1][end:]}"
        mutant = tmp_path / f"mutant{number}.py"
        mutant.write_text("".join(changed))
        mutants.append((mutant, f"{name}s_"))
    built = tmp_path / "built.py"
    built.write_text(
        "from countermark.results.subject import Subject\n"
        "from countermark.results.test_result import Freedoms\n"
        "Subject('x', reading=2)\nSubject('x', class_name=2)\nFreedoms(key=2)\n"
        "Freedoms(claim=2)\nFreedoms(dispute_reading=2)\nFreedoms(class_order=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=skip",
         "--cache-dir", str(tmp_path / "cache"), SOURCE / "results" / "subject.py", SOURCE / "errors.py",
         SOURCE / "results" / "test_result.py", built, *(each for each, _ in mutants)],
        cwd=SOURCE.parents[1], env={"MYPYPATH": str(SOURCE.parent), "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for mutant, name in mutants:
        said = [line for line in done.stdout.splitlines() if mutant.name in line]
        assert any("attr-defined" in line and f'"{name}"' in line for line in said), done.stdout
    wrong = [line for line in done.stdout.splitlines() if line.startswith(str(built))]
    assert len([line for line in wrong if "call-arg" in line]) == 6, done.stdout


# --- what was merely stated stands in the first line


def first_line(found: Reading, terms: VerificationOptions, subject: Subject = SUBJECT) -> str:
    verdict = judge(found, FairCoin(), subject=subject, key=KEY, terms=terms)
    assert verdict.owned, verdict.reason
    return verdict.explain().splitlines()[0]


def test_the_first_line_names_the_statements_that_it_rests_on() -> None:
    short = Reading(np.zeros(60, np.uint8), np.zeros(60, np.uint8))
    assert first_line(evidence(), VerificationOptions(assume_dated=True)) == (
        "OWNED: the mark of this key is present"  # 200 forgery bits need no statement
    )
    assert "the key is older than the suspect (the owner's statement)" in first_line(
        short, VerificationOptions(assume_dated=True)
    )
    assert "not older than 2026-06-01T00:00:00Z (the examiner's statement)" in first_line(
        short, VerificationOptions(dating=dating(3))
    )
    images = evidence(unit="images", likeness=ImageSimilarity(0.99, 0.7))
    assert "whoever chose the images did not know what the key reads in them" in first_line(
        images, VerificationOptions(blind_choice=True)
    )
    names = first_line(
        evidence(), VerificationOptions(blind_choice=True), replace(SUBJECT, class_names=10)
    )
    assert "whoever ordered the names of the classes did not know" in names
    opened = evidence(disclosure=Disclosure(50, 200, blind_choice=True))
    assert "whoever chose the opened triggers did not know" in first_line(
        opened, VerificationOptions(blind_choice=True)
    )


# --- no finding with several outcomes is a truth value


@pytest.mark.parametrize(
    ("finding", "asks"),
    [
        (Verdict("not_proven", "why", KEY, SUBJECT, 8), "verdict.owned"),
        (Verdict("owned", "why", KEY, SUBJECT, 8), "verdict.owned"),
        (Decision(()), "decision.outcome"),
        (Identification("s", {}, 0, None, {}), "identified.found"),
        (TraceResult((), 2, (), 1e-6, 0.0, 0.0, False, "why"), "traced.named"),
        (DisputeDecision("neither", "why", ("A", "B"), (None, None), (None, None), {}),
         "resolution.outcome"),
    ],
)  # fmt: skip
def test_a_finding_is_no_truth_value(finding: object, asks: str) -> None:
    with pytest.raises(TypeError, match=asks):
        bool(finding)
    with pytest.raises(TypeError, match="neither true nor false"):
        assert not finding


def test_a_result_knows_its_corrected_floor() -> None:
    found = TestResult("fair_coin", "", -10.0, -20.0, list_corrections(
        replace(SUBJECT, readings=100), Freedoms()))  # fmt: skip
    assert (found.log10_p, found.least_log10_p) == (pytest.approx(-8), pytest.approx(-18))
