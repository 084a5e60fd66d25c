"""Suspects as functions from images to classes: live classifiers, remote services, transcripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from countermark.errors import SuspectError
from countermark.results.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

Images: TypeAlias = NDArray[np.uint8]
"""Pictures (n, C, H, W), grey levels 0 to 255."""

Labels: TypeAlias = NDArray[np.int64]
"""Classes (n,); −1 for an image without a readable answer."""

Predictor: TypeAlias = Callable[[Images], Labels]
"""A suspect that is asked."""

# Images in one forward pass, so that memory does not grow with the number of images.
_BATCH = 256


@runtime_checkable
class DescribedPredictor(Protocol):
    """A function from images to classes that also describes itself for a verdict."""

    def __call__(self, images: Images, /) -> Labels:
        """Return the classes (n,) of images (n, C, H, W)."""

    def subject(self) -> Subject:
        """Describe the suspect for a verdict's record and corrections.

        Call this after the suspect was asked, since the description may count the answers.
        """


@dataclass(frozen=True)
class PredictorWithSubject:
    """A function from images to classes, together with its description for a verdict.

    Attributes:
        predict: the function.
        subject: returns the description, as in `DescribedPredictor`.
    """

    predict: Predictor
    subject: Callable[[], Subject]

    def __call__(self, images: Images, /) -> Labels:
        """Return the classes (n,) of images (n, C, H, W)."""
        return self.predict(images)


def normalise_images(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Normalise images (n, C, H, W) in grey levels for a model: (image − mean) / deviation.

    Args:
        images: the images, 0 to 255.
        mean: in grey levels, one value or one for each channel.
        deviation: in grey levels, one value or one for each channel.

    Returns: float32 of the same shape.
    """
    import torch

    offset, scale = (
        torch.tensor(each, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
        for each in (tuple(mean), tuple(deviation))
    )
    return (images.float() - offset) / scale


def make_module_predictor(
    model: nn.Module, mean: Sequence[float], deviation: Sequence[float]
) -> Predictor:
    """Wrap a live classifier as a function from images to classes.

    The classifier is in eval mode while it answers, and in its former mode afterwards. An image
    with a score that is not finite gets the class −1, which means no answer.

    Args:
        model: the classifier.
        mean: in grey levels; images enter the model as (image − mean) / deviation.
        deviation: in grey levels.

    Raises:
        SuspectError: when the function is called and the model does not accept the images, or does
            not answer with scores (n, classes).
    """
    import torch

    def predict(images: Images) -> Labels:
        """Return the classes (n,) of images (n, C, H, W), asked in batches."""
        # A model without parameters has no device of its own: it is asked on the CPU.
        where = next(iter(model.parameters()), torch.zeros(())).device
        was_training, found = model.training, []
        model.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(images), _BATCH):
                    # Copied, because torch warns about arrays that cannot be written to, such as
                    # those of a key.
                    part = torch.from_numpy(images[first : first + _BATCH].copy()).to(where)
                    found.append(
                        _select_classes(
                            _call_model(model, normalise_images(part, mean, deviation)), len(part)
                        )
                    )
        finally:
            model.train(was_training)
        return torch.cat(found).numpy()

    return predict


def make_predictor(suspect: object, mean: Sequence[float], deviation: Sequence[float]) -> Predictor:
    """Return a suspect as a function from images to classes.

    Args:
        suspect: a live classifier, or a function from images to classes, which is returned as is.
        mean: in grey levels; images enter a classifier as (image − mean) / deviation.
        deviation: in grey levels.

    Raises:
        SuspectError: the suspect is neither of these.
    """
    # Torch modules are callable as well, hence asked about first. Without torch installed an
    # isinstance check would not be possible.
    if hasattr(suspect, "state_dict"):
        return make_module_predictor(cast("nn.Module", suspect), mean, deviation)
    if callable(suspect):
        return suspect
    raise SuspectError(
        f"a key of triggers asks a suspect about images, and this is a {type(suspect).__name__}: "
        "expected a live classifier or a function from images to classes; build the model of a "
        "file first (--model)"
    )


def _call_model(model: nn.Module, images: Tensor) -> object:
    """Call a model that may raise anything.

    Raises:
        SuspectError: the model raised an error.
    """
    try:
        return model(images)
    except Exception as error:  # a model is foreign code and may raise anything
        said = str(error).strip().partition("\n")[0]
        raise SuspectError(
            f"the suspect does not take images of shape {list(images.shape)} "
            f"({type(error).__name__}: {said}): expected a classifier of the key's images"
        ) from None


def _select_classes(answer: object, count: int) -> Tensor:
    """Return the class with the largest score of each image, −1 where a score is not finite.

    Raises:
        SuspectError: the answer is no tensor of scores [count, classes].
    """
    import torch

    if not isinstance(answer, torch.Tensor) or answer.dim() != 2 or len(answer) != count:
        shown = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise SuspectError(
            f"the suspect answers {count} images with {shown}: expected scores [{count}, classes]"
        )
    # argmax over NaN returns some class, which would count as an answer.
    scores = answer.float().cpu()
    return scores.argmax(dim=1).where(scores.isfinite().all(dim=1), torch.tensor(-1))
