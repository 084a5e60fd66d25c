"""The `recipient` commands: mark a copy for each recipient, and trace a copy to its recipient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from countermark.cli.options import (
    AsJson,
    AssumeDated,
    Checkpoint,
    Encrypt,
    NewCheckpoint,
    NewKey,
    Settings,
    WeightSuspect,
    parse_pairs,
    read_key_passphrase,
    read_new_passphrase,
    require_owner,
    require_probability,
    show_result,
)
from countermark.errors import make_printable

Epsilon = Annotated[
    float,
    typer.Option(
        metavar="P", help="Largest chance that any innocent recipient is named.",
        callback=require_probability,
    ),
]  # fmt: skip


def make_recipient_key(
    model: Checkpoint,
    count: Annotated[int, typer.Option(metavar="N", help="How many recipients.")],
    owner: Annotated[str, typer.Option(metavar="TEXT", help="Whose key it is.")],
    key: NewKey,
    coalition: Annotated[
        int, typer.Option(metavar="C", help="How many may mix their copies and still be traced.")
    ] = 3,
    epsilon: Epsilon = 1e-6,
    runs: Annotated[int, typer.Option(min=1, help="Simulated coalitions for each strategy.")] = 30,
    settings: Settings = None,
    encrypt: Encrypt = False,
    as_json: AsJson = False,
) -> int:
    """Make a key with a code that identifies each recipient of a checkpoint.

    Prints the strength of the code against simulated coalitions of recipients.

    \b
    Example:
        countermark recipient new other.safetensors --count 10 --coalition 2 --owner "ACME Inc." \\
            --key customers.key
    """
    from countermark.keys.storage import refuse_existing
    from countermark.recipients import make_recipients_key
    from countermark.recipients.collusion import STRATEGIES
    from countermark.stamping.copying import require_key_outside

    require_owner(owner)
    # Check the place of the key before the code is made and simulated, which takes a while.
    refuse_existing(key)
    require_key_outside(key, model)
    # Ask for the passphrase before the long computation, while somebody still sits there.
    passphrase = read_new_passphrase() if encrypt else None
    made, code, advice = make_recipients_key(
        model,
        (count, coalition),
        owner=owner,
        epsilon=epsilon,
        fields=parse_pairs(settings, "--set"),
    )
    # The seed is fixed so that the same code always prints the same simulated rates. It has no
    # part in the secret of the key.
    found = {
        name: code.simulate_coalitions(name, coalition, runs=runs, seed=0) for name in STRATEGIES
    }
    made.save(key, passphrase)
    about: dict[str, Any] = {
        "key": str(key), "commitment": made.commitment, "recipients": count,
        "coalition": coalition, "length": code.length, "epsilon": epsilon,
        "expected_change": advice.change, "expected_change_of_tensors": advice.whole,
        "simulated": {
            name: {"runs": each.runs, "traced": each.traced, "accused": each.accused,
                   "most_accused": each.accusation_bound}
            for name, each in found.items()
        },
    }  # fmt: skip
    bears = f"a code of {code.length} bits against coalitions of {coalition}, epsilon {epsilon:g}"
    costs = f"{advice.change:.2%} of {advice.read:,} values, {advice.whole:.2%} of the tensors"
    lines = [
        f"{key}: {count} recipients, {bears}; commitment {made.commitment}",
        f"each copy: expected change {costs} as wholes",
        *(
            f"simulated, {name}: traced in {each.traced} of {each.runs}, an innocent named in "
            f"{each.accused} (95 %: below {each.accusation_bound:.2g})"
            for name, each in found.items()
        ),
        "The key holds no names: keep a list of who is which number, from 0 on.",
    ]
    show_result(about, as_json, "\n".join(lines))
    return 0


def stamp_recipient_copy(
    model: Checkpoint,
    key: Annotated[Path, typer.Option(metavar="DIR", help="The key for all recipients.")],
    number: Annotated[int, typer.Option(metavar="N", help="Which recipient, from 0 on.")],
    out: NewCheckpoint,
    as_json: AsJson = False,
) -> int:
    """Make the copy for one recipient, from the checkpoint that the key was made for.

    \b
    Example:
        countermark recipient stamp other.safetensors --key customers.key --number 7 \\
            --out seven.safetensors
    """
    from countermark.keys.key import Key
    from countermark.recipients import issue_copy

    copy = issue_copy(model, out, Key.load(key, read_key_passphrase(key)), number)
    about = {
        "model": str(out), "number": number, "change": copy.change, "left_out": list(copy.left_out)
    }  # fmt: skip
    text = f"{out}: the copy of recipient {number}, relative change {copy.change:.2%}"
    show_result(about, as_json, text)
    return 0


def trace_recipients(
    suspect: WeightSuspect,
    key: Annotated[Path, typer.Option(metavar="DIR", help="The key for all recipients.")],
    epsilon: Epsilon = 1e-6,
    assume_dated: AssumeDated = False,
    as_json: AsJson = False,
) -> int:
    """Name the recipients whose copies are in a suspect, or say that nobody can be named.

    Exits 0 when somebody is named, 3 when nobody can be named or the key could have been made to
    accuse, 2 when something stopped the answer.

    \b
    Example:
        countermark recipient trace seven.safetensors --key customers.key
        countermark recipient trace other.safetensors --key customers.key  # exit 3
    """
    from countermark.keys.key import Key
    from countermark.recipients import trace as traced
    from countermark.results.test_result import describe_corrections

    loaded = Key.load(key, read_key_passphrase(key))
    done = traced(suspect, loaded, epsilon=epsilon, assume_dated=assume_dated)
    lines = [done.reason]
    lines += [f"  recipient {number}: log10 of the chance {p:.1f}" for number, p in done.named]
    lines.append(
        f"  epsilon {done.epsilon:g} for all {done.recipients} recipients; the best has log10 "
        f"{done.best:.1f}"
    )
    if done.corrections:
        lines.append(f"  each chance is {describe_corrections(done.corrections)}")
    # How hard the key is to forge matters only if the key accuses somebody.
    if done.named:
        said = "you state that it is older" if assume_dated else "an undated key needs 80"
        lines.append(f"  forgery_bits {done.forgery_bits:.1f} ({said})")
        lines += [f"  limit {each}" for each in done.limits]
    show_result(done.to_json(), as_json, "\n".join(map(make_printable, lines)))
    return done.exit_code
