"""A weight file as a live suspect: the model it belongs to, built and filled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from countermark.bench.embed import load_into
from countermark.bench.models import build
from countermark.errors import ConfigError, make_printable
from countermark.keys.key import Key
from countermark.predictors.base import PredictorWithSubject, make_module_predictor
from countermark.results.subject import Subject
from countermark.verification.disclosure import TriggerDisclosure


def asked(
    path: Path, key: Key | TriggerDisclosure, model: str | None, arguments: Mapping[str, Any]
) -> PredictorWithSubject:
    """A weight file as a suspect that is asked.

    Args:
        path: the suspect's file.
        key: a key of triggers, or some of one; says how the host takes images, and by default what
            it is, which opened triggers never do.
        model: what the file is the weights of, where it is not the key's own host.
        arguments: of that model.

    Raises:
        SuspectError: the file cannot be read.
        ConfigError: nothing says what it belongs to, it does not fit that, or the key names code
            that nobody trusted.
    """
    name = model or key.model
    if name is None:
        raise ConfigError(
            "a key of triggers asks a live model, and the key does not say which: give --model"
        )
    if model is None and ":" in name:
        raise ConfigError(
            f"the key names code of its own as its host, {make_printable(name, 200)}: if you trust it, "
            "repeat it as --model"
        )
    built = build(name, dict(arguments) or ({} if model else dict(key.model_arguments)))
    load_into(built, path)
    predict = make_module_predictor(built, key.fields["mean"], key.fields["deviation"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    subject = Subject(name=str(path), file_sha256=digest, model=name)
    return PredictorWithSubject(predict, lambda: subject)
