"""The program of one job's process: read the suspect, judge it, write the answer.

It runs in the job's folder and writes its output there. Its task comes as one line of JSON on
standard input. It prints its steps, and last its outcome or failure, as lines of JSON on standard
output. It ends when standard input ends, because then the server is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark._internal import files
from countermark.errors import ConfigError, CountermarkError, make_printable
from countermark.keys.passphrase import read_passphrase_file
from countermark.web.runner import ANSWER, BODY, REPORT

if TYPE_CHECKING:
    from countermark.checkpoints import Suspect
    from countermark.keys.key import Key
    from countermark.predictors.base import Predictor
    from countermark.report.bundle import DatingDocuments as Evidence
    from countermark.results.verdict import Verdict

# Bytes of a file that a job may write.
_LARGEST_WRITTEN = 64 << 20
Task = Mapping[str, Any]


def main() -> None:
    """Read the task, run it, and print its outcome or why it failed."""
    task: Task = json.loads(sys.stdin.buffer.readline())
    _limit_resources(int(task["memory"]))
    threading.Thread(target=_exit_with_server, daemon=True).start()
    try:
        _send_message(outcome=_TASKS[task["kind"]](task))
    except CountermarkError as error:
        _send_message(failed=_replace_paths(str(error), task))
    except MemoryError:
        _send_message(failed=f"it takes more memory than {int(task['memory']) / (1 << 30):g} GiB")
    # The traceback goes to a file on the server; the visitor sees the kind of the error only.
    except Exception as error:
        traceback.print_exc()
        _send_message(failed=_replace_paths(f"internal error, {type(error).__name__}", task))


def _limit_resources(memory: int) -> None:
    """Limit the process: address space, size of written files, and no core dump.

    Args:
        memory: bytes of address space.
    """
    # Windows has no such limits.
    with suppress(ImportError):
        import resource

        for kind, wanted in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, _LARGEST_WRITTEN),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(kind)
            # A process may lower its hard limit but never raise it.
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (most, most))


def _exit_with_server() -> None:
    """Wait for the end of standard input, then end the process."""
    # `os._exit`, because this thread cannot stop a computation in the main thread otherwise.
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def _send_message(**told: Any) -> None:
    """Print a message to the server as one line of JSON."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _replace_paths(text: str, task: Task) -> str:
    """Return a message with the names that the visitor knows in place of the server's paths."""
    # Longest paths first: one path may be the beginning of another.
    for path, name in sorted(task["names"].items(), key=lambda each: -len(each[0])):
        text = text.replace(path, name)
    return make_printable(text, 600)


def _verify_suspect(task: Task) -> str:
    """Read a suspect with a key, write verdict and report, and return the outcome."""
    from countermark.results.verdict import VerificationOptions
    from countermark.verification.verify import examine

    _send_message(step="opening the key")
    key = _load_key(task["key"])
    dating, evidence = _date_key(task, key)
    path = Path(task["suspect"])
    terms = VerificationOptions(
        task["alpha"], task["assume_dated"], task["blind_choice"], dating=dating
    )
    _send_message(step="reading the suspect")
    with _open_suspect(path, key) as suspect:
        verdict = examine(suspect, key, terms, digest=True)
    # Verdict and report are shown to the visitor, so no path of the server may stand in them.
    subject = replace(verdict.subject, name=task["names"][task["suspect"]])
    reason = _replace_paths(verdict.reason, task)
    verdict = replace(verdict, subject=subject, reason=reason)
    _send_message(step="writing the report")
    _write_report(verdict, key, evidence)
    files.write_bytes(Path(ANSWER), json.dumps(verdict.to_json()).encode())
    return verdict.outcome


def _decide_dispute(task: Task) -> str:
    """Decide a dispute, write the decision, and return its outcome."""
    from countermark.claims.timestamp import Authority
    from countermark.verification.dispute import (
        ExaminerSettings,
        PartyExhibits,
        audit_ledger_at,
        settle_dispute,
    )

    _send_message(step="checking the ledger")
    counted = audit_ledger_at(task["ledger"])
    shown = [
        PartyExhibits(_load_key(folder), _find_claim(task["ledger"], digest), Path(model))
        for folder, digest, model in zip(task["keys"], task["claims"], task["models"], strict=True)
    ]
    _send_message(step="reading both keys from three models")
    believed = [Authority.load(each) for each in task["authorities"]]
    found = settle_dispute(
        Path(task["suspect"]),
        shown,
        _open_suspect,
        ExaminerSettings(task["alpha"], believed, counted),
    ).to_json()
    files.write_bytes(Path(ANSWER), json.dumps(_replace_paths_in_json(found, task)).encode())
    return str(found["outcome"])


_TASKS = {"verify": _verify_suspect, "resolve": _decide_dispute}


def _replace_paths_in_json(value: Any, task: Task) -> Any:
    """Return JSON values with names in place of the server's paths."""
    if isinstance(value, str):
        return _replace_paths(value, task)
    if isinstance(value, list):
        return [_replace_paths_in_json(each, task) for each in value]
    if isinstance(value, dict):
        return {name: _replace_paths_in_json(each, task) for name, each in value.items()}
    return value


def _load_key(folder: str) -> Key:
    """Load a key, with the passphrase file of the environment if the key is encrypted."""
    from countermark.keys.key import Key
    from countermark.keys.storage import load_header

    # Only for an encrypted key: a passphrase file that cannot be read then stops no other job.
    encrypted = load_header(Path(folder)).encryption is not None
    return Key.load(folder, read_passphrase_file() if encrypted else None)


def _find_claim(url: str, digest: str) -> Any:
    """Return a claim of the ledger.

    Raises:
        ConfigError: the ledger has no claim with this digest.
    """
    from countermark.claims.ledger import Ledger

    with Ledger(url) as ledger:
        found = ledger.find(digest=digest)
    if not found:
        raise ConfigError(f"the ledger has no claim {digest}: expected the digest of one")
    return found[0].claim


def _date_key(task: Task, key: Key) -> tuple[Any, Evidence | None]:
    """Return the key's dating by a claim of the ledger, and the evidence for it.

    Returns: two times None if the task names no claim.

    Raises:
        ConfigError: the server trusts no timestamping authority.
    """
    from countermark.report.dated import ClaimOptions

    if task["claim"] is None:
        return None, None
    claim = Path("claim.json")
    files.write_bytes(claim, _find_claim(task["ledger"], task["claim"]).to_bytes())
    pinned = [Path(each) for each in task["authorities"]]
    if not pinned:
        raise ConfigError("this server believes no time-stamping authority: no claim dates a key")
    dated = ClaimOptions(claim, pinned, [], task["suspect_date"], task["ledger"])
    found = dated.date_with_documents(key)
    return found if found is not None else (None, None)


@contextmanager
def _open_suspect(path: Path, key: Key) -> Iterator[Suspect | Predictor]:
    """Yield a file as a suspect: as a live model for a key of triggers, else as its path."""
    from countermark.schemes import load_scheme
    from countermark.schemes.triggers import TriggerScheme

    if isinstance(load_scheme(key), TriggerScheme):
        # The key names the model. A key that names code of its own is refused.
        from countermark.training.load_predictor import load_file_predictor

        yield load_file_predictor(path, key, None, {})
    else:
        yield path


def _write_report(verdict: Verdict, key: Key, evidence: Evidence | None) -> None:
    """Write the bundle, and the report as a page and as a part of the job's page.

    The bundle stays on the server. Without a reading nothing is written.
    """
    from countermark.report.bundle import make_bundle_files, save_bundle
    from countermark.report.page import PageDetails, render_body, render_page
    from countermark.report.record import make_record
    from countermark.schemes import find_scheme_class

    record = make_record(verdict)
    if record is None:
        return
    content = make_bundle_files(record, evidence, None)
    paper = str(find_scheme_class(verdict.scheme).paper)
    # Single bits stay hidden: visitors choose suspects, and could learn the key from the bits.
    about = PageDetails(paper, 0.1, key.fields, each_bit=False)
    save_bundle(Path("bundle"), content)
    files.write_bytes(Path(REPORT), render_page(record, verdict, content, about))
    files.write_bytes(Path(BODY), render_body(record, verdict, content, about).encode())


if __name__ == "__main__":
    main()
