"""The evaluation of MPAI-NNW: imperceptibility, robustness and cost of a marking technology.

M unmarked networks and D payloads give M×D marked networks. One modification at one value is
applied to all M×(D + 1) networks. The detector runs on every network and gives the numbers of false
positives and false negatives. The decoder runs on the marked networks and gives the mean symbol
error rate. Modifications do not know the key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from countermark.errors import ConfigError
from countermark.schemes import find_scheme_class
from countermark.schemes.outputs import OutputScheme
from countermark_lab.mpai.classifiers import ClassifierTechnology
from countermark_lab.mpai.evaluation import evaluate
from countermark_lab.mpai.images import ImageTechnology
from countermark_lab.mpai.trial import Technology, Trial


def run(trial: Trial, only: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a scheme in networks of its kind.

    Args:
        trial: the settings; model, data and modifications that it leaves out are the default ones
            of the kind of network.
        only: names of the modifications to run; all when empty.

    Returns: the dictionary of `evaluate`.

    Raises:
        ConfigError: there is no such modification, or scheme, model and fields do not fit.
    """
    # A scheme of outputs marks the images a network makes; all others mark classifiers.
    kind: type[ClassifierTechnology | ImageTechnology] = ClassifierTechnology
    if issubclass(find_scheme_class(trial.scheme), OutputScheme):
        kind = ImageTechnology
    usual = trial.modifications or kind.modifications
    known = dict.fromkeys(name for name, _ in usual)
    if only and not set(only) <= set(known):
        raise ConfigError(f"--only {', '.join(only)}: expected {', '.join(known)}")
    trial = replace(
        trial,
        model=trial.model or kind.model,
        data=trial.data or kind.data,
        modifications=[each for each in usual if not only or each[0] in only],
    )
    technology: Technology = kind(trial)
    return evaluate(trial, technology)
