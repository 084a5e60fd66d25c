"""Suspects that are asked: a function from images to classes, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError
from countermark.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

Images: TypeAlias = NDArray[np.uint8]
"""Pictures (n, C, H, W), grey levels 0 to 255."""

Labels: TypeAlias = NDArray[np.int64]
"""Classes (n,); −1 where there was no answer, or none that could be read."""

Predict: TypeAlias = Callable[[Images], Labels]
"""A suspect that is asked."""

_BATCH = 256


@runtime_checkable
class Recorded(Protocol):
    """A suspect that is asked, and of which a verdict records more than its kind."""

    def __call__(self, images: Images, /) -> Labels:
        """The classes of these images."""

    def subject(self) -> Subject:
        """Describe the suspect, once it was asked, for a verdict's record and corrections."""


@dataclass(frozen=True)
class Asked:
    """A function that is asked, with what a verdict records of it.

    Attributes:
        predict: how it is asked.
        subject: what is recorded, as `Recorded` says.
    """

    predict: Predict
    subject: Callable[[], Subject]

    def __call__(self, images: Images, /) -> Labels:
        """The classes of these images."""
        return self.predict(images)


def fed(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Images (n, C, H, W) in grey levels as a host takes them: (image − mean) / deviation.

    Mean and deviation are in grey levels, one value or one for each channel.

    Returns: float32 of the same shape.
    """
    import torch

    offset, scale = (
        torch.tensor(each, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
        for each in (tuple(mean), tuple(deviation))
    )
    return (images.float() - offset) / scale


def of_module(model: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> Predict:
    """A live classifier as a suspect that is asked; it is in eval mode meanwhile.

    Scores that are not finite count as no answer.

    Raises:
        SuspectError: when asked, the model does not take the images, or does not answer them with
            scores (n, classes).
    """
    import torch

    def predict(images: Images) -> Labels:
        where = next(iter(model.parameters()), torch.zeros(())).device
        was_training, found = model.training, []
        model.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(images), _BATCH):
                    part = torch.from_numpy(images[first : first + _BATCH].copy()).to(where)
                    found.append(_classes(_answer(model, fed(part, mean, deviation)), len(part)))
        finally:
            model.train(was_training)
        return torch.cat(found).numpy()

    return predict


def asked_of(suspect: object, mean: Sequence[float], deviation: Sequence[float]) -> Predict:
    """Whatever can be asked as a function from images to classes: such a one, or a live classifier.

    A classifier is fed with (image − mean) / deviation, as `of_module` says.

    Raises:
        SuspectError: it is neither.
    """
    if hasattr(suspect, "state_dict"):
        return of_module(cast("nn.Module", suspect), mean, deviation)
    if callable(suspect):
        return suspect
    raise SuspectError(
        f"a key of triggers asks a suspect about images, and this is a {type(suspect).__name__}: "
        "expected a live classifier or a function from images to classes; build the model of a "
        "file first (--model)"
    )


def _answer(model: nn.Module, images: Tensor) -> object:
    try:
        return model(images)
    except Exception as error:  # a model is foreign code and may raise anything
        said = str(error).strip().partition("\n")[0]
        raise SuspectError(
            f"the suspect does not take images of shape {list(images.shape)} "
            f"({type(error).__name__}: {said}): expected a classifier of the key's images"
        ) from None


def _classes(answer: object, count: int) -> Tensor:
    import torch

    if not isinstance(answer, torch.Tensor) or answer.dim() != 2 or len(answer) != count:
        shown = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise SuspectError(
            f"the suspect answers {count} images with {shown}: expected scores [{count}, classes]"
        )
    scores = answer.float().cpu()
    return scores.argmax(dim=1).where(scores.isfinite().all(dim=1), torch.tensor(-1))
