"""Experiments on networks from images to images: barriers, and who copies what is behind them.

A cell is one barrier by itself, or one that a surrogate copied. Barriers and unmarked twins are
shared between cells through a cache, so that no cell lasts longer than one training of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from countermark.training.image_tasks import Task
from countermark_lab.experiments.spec import CellSpec, Name, SpecModel
from countermark_lab.image_models.breaks import Break


class ImagingData(SpecModel):
    """What the network is given and makes.

    Attributes:
        data: `drawn`, or a folder of pictures.
        task: what is to be undone. The network itself is ideal: it puts out the true pictures.
        owner, thief, test: how many squares of `side` pixels each has; they share no picture.
    """

    data: str
    task: Task
    owner: PositiveInt
    thief: PositiveInt
    test: PositiveInt
    side: PositiveInt = 64
    channels: Literal[1, 3] = 1


class BarrierForm(SpecModel):
    """A barrier: the fields of `deep_watermarking`."""

    label: str
    fields: dict[str, Any] = Field(default={})


class SurrogateSpec(SpecModel):
    """How a thief copies, or what becomes of the barrier.

    Attributes:
        architecture, loss, adversarial: of the surrogate, see `deep_watermarking.surrogates`.
        spoil: what he does to the images, see `breaks`.
        absorbed: no thief: the owner's own network learns the task and the mark in one.
        strength: of an absorbed mark, as a multiple of the barrier's residual; 1 when not given.
    """

    since = frozenset({"strength"})

    label: str
    architecture: Literal["cnet", "res9", "res16", "unet"] = "unet"
    loss: Literal["l1", "l2", "perceptual"] = "l2"
    adversarial: bool = False
    spoil: Break = ""
    absorbed: bool = False
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


class CopyingSpec(SpecModel):
    """How long surrogates are trained, and on what the features of a perceptual loss were."""

    steps: PositiveInt
    batch: PositiveInt = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    features_data: str = ""


class ImagingExperiment(SpecModel):
    """The whole file; `track` says how far it is from the paper's own scale.

    `siblings` unmarked networks are what the published form is ranked among.
    """

    name: Name
    title: str
    track: str
    seeds: tuple[int, ...]
    images: ImagingData
    copies: CopyingSpec
    siblings: NonNegativeInt = 0
    forms: tuple[BarrierForm, ...]
    surrogates: tuple[SurrogateSpec, ...] = ()


class ImagingCell(CellSpec):
    """One barrier at one seed, by itself or copied."""

    images: ImagingData
    copies: CopyingSpec
    siblings: NonNegativeInt
    label: str
    form: BarrierForm
    surrogate: SurrogateSpec | None


def list_imaging_cells(experiment: ImagingExperiment) -> Iterator[ImagingCell]:
    """Every cell: each form by itself, then with each surrogate, at each seed."""
    for form in experiment.forms:
        for surrogate in (None, *experiment.surrogates):
            for seed in experiment.seeds:
                yield ImagingCell(
                    experiment=experiment.name,
                    track=experiment.track,
                    images=experiment.images,
                    copies=experiment.copies,
                    siblings=experiment.siblings,
                    label=form.label + (f": {surrogate.label}" if surrogate else ""),
                    form=form,
                    surrogate=surrogate,
                    seed=seed,
                )
