"""The process of one job: reads, judges, writes what came out into the folder it was started in.

It is told its task in one line on standard input, says its steps and its answer in lines on
standard output, and ends when standard input does: then the server is gone.
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

_LARGEST_WRITTEN = 64 << 20  # bytes of a file that a job may write
Task = Mapping[str, Any]


def main() -> None:
    """Do the task that is told, and say what came out."""
    task: Task = json.loads(sys.stdin.buffer.readline())
    _limit(int(task["memory"]))
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    try:
        _say(outcome=_TASKS[task["kind"]](task))
    except CountermarkError as error:
        _say(failed=_without_paths(str(error), task))
    except MemoryError:
        _say(failed=f"it takes more memory than {int(task['memory']) / (1 << 30):g} GiB")
    except Exception as error:
        traceback.print_exc()
        _say(failed=_without_paths(f"internal error, {type(error).__name__}", task))


def _limit(memory: int) -> None:
    """Of address space and of files that are written; no core, whatever happens."""
    with suppress(ImportError):  # no such limits on Windows
        import resource

        for kind, wanted in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, _LARGEST_WRITTEN),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(kind)
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (most, most))


def _leave_with_the_server() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def _say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _without_paths(text: str, task: Task) -> str:
    """A message in which what lies on the server is called by the names that the user knows."""
    for path, name in sorted(task["names"].items(), key=lambda each: -len(each[0])):
        text = text.replace(path, name)
    return printable(text, 600)


def _verify(task: Task) -> str:
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
    subject = replace(verdict.subject, name=task["names"][task["suspect"]])
    reason = _without_paths(verdict.reason, task)
    verdict = replace(verdict, subject=subject, reason=reason)
    _say(step="writing the report")
    _report(verdict, key, evidence)
    files.write_bytes(Path(ANSWER), json.dumps(verdict.to_json()).encode())
    return verdict.outcome


def _resolve(task: Task) -> str:
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
    """JSON values without paths of the server."""
    if isinstance(value, str):
        return _without_paths(value, task)
    if isinstance(value, list):
        return [_renamed(each, task) for each in value]
    if isinstance(value, dict):
        return {name: _renamed(each, task) for name, each in value.items()}
    return value


def _key(folder: str) -> Key:
    from countermark.key import Key
    from countermark.keyfile import load_header

    encrypted = load_header(Path(folder)).encryption is not None
    return Key.load(folder, passphrase_file() if encrypted else None)


def _claim(url: str, digest: str) -> Any:
    from countermark.claims.ledger import Ledger

    with Ledger(url) as ledger:
        found = ledger.find(digest=digest)
    if not found:
        raise ConfigError(f"the ledger has no claim {digest}: expected the digest of one")
    return found[0].claim


def _dated(task: Task, key: Key) -> tuple[Any, Evidence | None]:
    """What a claim of the ledger says of the key's age, and what shows it."""
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
    """A file as a suspect of a key: its model is asked where the key is one of triggers."""
    from countermark.schemes import scheme_of
    from countermark.schemes.black_box import TriggerScheme

    if isinstance(scheme_of(key), TriggerScheme):
        from countermark.bench.live import asked

        yield asked(path, key, None, {})
    else:
        yield path


def _report(verdict: Verdict, key: Key, evidence: Evidence | None) -> None:
    """The report, as a page of its own and as a part of one; the bundle stays on the server."""
    from countermark.report.bundle import contents, save
    from countermark.report.page import About, body, page
    from countermark.report.record import record_of
    from countermark.schemes import scheme_named

    record = record_of(verdict)
    if record is None:
        return
    content = contents(record, evidence, None)
    paper = str(scheme_named(verdict.scheme).paper)
    about = About(paper, 0.1, key.fields, each_bit=False)
    save(Path("bundle"), content)
    files.write_bytes(Path(REPORT), page(record, verdict, content, about))
    files.write_bytes(Path(BODY), body(record, verdict, content, about).encode())


if __name__ == "__main__":
    main()
