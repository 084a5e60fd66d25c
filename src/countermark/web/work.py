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

from countermark import files
from countermark.errors import ConfigError, CountermarkError, printable
from countermark.passphrase import passphrase_file
from countermark.web.runner import ANSWER, BODY, REPORT

if TYPE_CHECKING:
    from countermark.answers import Predict
    from countermark.key import Key
    from countermark.report.bundle import Dated as Evidence
    from countermark.verdict import Verdict
    from countermark.weights import Suspect

# Bytes of a file that a job may write.
_LARGEST_WRITTEN = 64 << 20
Task = Mapping[str, Any]


def main() -> None:
    """Read the task, run it, and print its outcome or why it failed."""
    task: Task = json.loads(sys.stdin.buffer.readline())
    _limit(int(task["memory"]))
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    try:
        _say(outcome=_TASKS[task["kind"]](task))
    except CountermarkError as error:
        _say(failed=_without_paths(str(error), task))
    except MemoryError:
        _say(failed=f"it takes more memory than {int(task['memory']) / (1 << 30):g} GiB")
    # The traceback goes to a file on the server; the visitor sees the kind of the error only.
    except Exception as error:
        traceback.print_exc()
        _say(failed=_without_paths(f"internal error, {type(error).__name__}", task))


def _limit(memory: int) -> None:
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


def _leave_with_the_server() -> None:
    """Wait for the end of standard input, then end the process."""
    # `os._exit`, because this thread cannot stop a computation in the main thread otherwise.
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def _say(**told: Any) -> None:
    """Print a message to the server as one line of JSON."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _without_paths(text: str, task: Task) -> str:
    """Return a message with the names that the visitor knows in place of the server's paths."""
    # Longest paths first: one path may be the beginning of another.
    for path, name in sorted(task["names"].items(), key=lambda each: -len(each[0])):
        text = text.replace(path, name)
    return printable(text, 600)


def _verify(task: Task) -> str:
    """Read a suspect with a key, write verdict and report, and return the outcome."""
    from countermark.examine import examine
    from countermark.verdict import Terms

    _say(step="opening the key")
    key = _key(task["key"])
    dating, evidence = _dated(task, key)
    path = Path(task["suspect"])
    terms = Terms(task["alpha"], task["assume_dated"], task["blind_choice"], dating=dating)
    _say(step="reading the suspect")
    with _opened(path, key) as suspect:
        verdict = examine(suspect, key, terms, digest=True)
    # Verdict and report are shown to the visitor, so no path of the server may stand in them.
    subject = replace(verdict.subject, name=task["names"][task["suspect"]])
    reason = _without_paths(verdict.reason, task)
    verdict = replace(verdict, subject=subject, reason=reason)
    _say(step="writing the report")
    _report(verdict, key, evidence)
    files.write_bytes(Path(ANSWER), json.dumps(verdict.to_json()).encode())
    return verdict.outcome


def _resolve(task: Task) -> str:
    """Decide a dispute, write the decision, and return its outcome."""
    from countermark.claims.timestamp import Authority
    from countermark.disputes import Examiner, Shown, audited, settle

    _say(step="checking the ledger")
    counted = audited(task["ledger"])
    shown = [
        Shown(_key(folder), _claim(task["ledger"], digest), Path(model))
        for folder, digest, model in zip(task["keys"], task["claims"], task["models"], strict=True)
    ]
    _say(step="reading both keys from three models")
    believed = [Authority.load(each) for each in task["authorities"]]
    found = settle(
        Path(task["suspect"]), shown, _opened, Examiner(task["alpha"], believed, counted)
    ).to_json()
    files.write_bytes(Path(ANSWER), json.dumps(_renamed(found, task)).encode())
    return str(found["outcome"])


_TASKS = {"verify": _verify, "resolve": _resolve}


def _renamed(value: Any, task: Task) -> Any:
    """Return JSON values with names in place of the server's paths."""
    if isinstance(value, str):
        return _without_paths(value, task)
    if isinstance(value, list):
        return [_renamed(each, task) for each in value]
    if isinstance(value, dict):
        return {name: _renamed(each, task) for name, each in value.items()}
    return value


def _key(folder: str) -> Key:
    """Load a key, with the passphrase file of the environment if the key is encrypted."""
    from countermark.key import Key
    from countermark.keyfile import load_header

    # Only for an encrypted key: a passphrase file that cannot be read then stops no other job.
    encrypted = load_header(Path(folder)).encryption is not None
    return Key.load(folder, passphrase_file() if encrypted else None)


def _claim(url: str, digest: str) -> Any:
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


def _dated(task: Task, key: Key) -> tuple[Any, Evidence | None]:
    """Return the key's dating by a claim of the ledger, and the evidence for it.

    Returns: two times None if the task names no claim.

    Raises:
        ConfigError: the server trusts no timestamping authority.
    """
    from countermark.report.dated import Dated

    if task["claim"] is None:
        return None, None
    claim = Path("claim.json")
    files.write_bytes(claim, _claim(task["ledger"], task["claim"]).to_bytes())
    pinned = [Path(each) for each in task["authorities"]]
    if not pinned:
        raise ConfigError("this server believes no time-stamping authority: no claim dates a key")
    dated = Dated(claim, pinned, [], task["suspect_date"], task["ledger"])
    found = dated.shown(key)
    return found if found is not None else (None, None)


@contextmanager
def _opened(path: Path, key: Key) -> Iterator[Suspect | Predict]:
    """Yield a file as a suspect: as a live model for a key of triggers, else as its path."""
    from countermark.schemes import scheme_of
    from countermark.schemes.black_box import TriggerScheme

    if isinstance(scheme_of(key), TriggerScheme):
        # The key names the model. A key that names code of its own is refused.
        from countermark.bench.live import asked

        yield asked(path, key, None, {})
    else:
        yield path


def _report(verdict: Verdict, key: Key, evidence: Evidence | None) -> None:
    """Write the bundle, and the report as a page and as a part of the job's page.

    The bundle stays on the server. Without a reading nothing is written.
    """
    from countermark.report.bundle import contents, save
    from countermark.report.page import About, body, page
    from countermark.report.record import record_of
    from countermark.schemes import scheme_named

    record = record_of(verdict)
    if record is None:
        return
    content = contents(record, evidence, None)
    paper = str(scheme_named(verdict.scheme).paper)
    # Single bits stay hidden: visitors choose suspects, and could learn the key from the bits.
    about = About(paper, 0.1, key.fields, each_bit=False)
    save(Path("bundle"), content)
    files.write_bytes(Path(REPORT), page(record, verdict, content, about))
    files.write_bytes(Path(BODY), body(record, verdict, content, about).encode())


if __name__ == "__main__":
    main()
