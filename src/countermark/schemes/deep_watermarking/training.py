"""Zhang et al. 2020/2021, the default form: train H and R for all messages, before the key.

In each step every image bears a random message, so that R learns to read any message and cannot
memorise one. Between H and R the images are damaged in the way that a surrogate damages a mark: a
surrogate learns it fainter and somewhat blurred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark._internal.progress import show_progress
from countermark.keys.key import Key
from countermark.schemes.deep_watermarking.placement import Placement, TilePlacement, make_placement
from countermark.schemes.deep_watermarking.scheme import DeepWatermarking
from countermark.schemes.deep_watermarking.surrogates import (
    CopyingOptions,
    run_network,
    train_surrogate,
)
from countermark.schemes.deepstego.networks import compute_ssim
from countermark.schemes.frozen_networks import export_weights, fill_network
from countermark.schemes.outputs_training import (
    NETWORKS,
    OutputTraining,
    TrainingStore,
    cut_squares,
    draw_seed,
    round_to_uint8,
)

_RATE = 2e-3  # initial learning rate of Adam
_LOUD = 20.0  # dB, PSNR of the first marked images: R finds a loud mark sooner
_FADED = 0.5  # share of the steps after which the mark has its final PSNR
# After a third of the steps, and not before `_PATIENT` steps, R's loss decides about a new
# attempt. A loss of ln 2 is that of guesses; above 97 % of it R reads nothing.
_BEGUN = 3
_PATIENT = 30
_GUESSES = 0.97 * math.log(2)
_RECENT = 0.1  # weight of the last step in the running mean of the loss
_TRIES = 4
_FAINTEST = 0.3  # smallest factor of the residual in the images that R is trained on
_NOISE = 3 / 255
# Of a cell: a bit that moves by a whole cell is read as another bit.
_MOVED = 0.5
_TUNING_RATE = 3e-4  # of Adam, in the adversarial stage
_TUNED = 0.4  # R's steps in the adversarial stage, as a share of a teacher's steps
_LIKENESS = 1.0  # weight of 1 − SSIM
_CALIBRATED_ON = 256  # number of squares
_PART = 32


class MessageAgnosticTraining(OutputTraining):
    """Trains and freezes H and R; the key's message is drawn after them."""

    def make_pre_commit_tensors(self) -> dict[str, NDArray[Any]]:
        """Train H and R, in the adversarial stage too with teachers; return their tensors."""
        seed = draw_seed(self.material.make_stream("networks"))
        network = train_networks(self.scheme, self.outputs, seed, self.saving)
        if self.scheme.teachers:
            train_adversarially(network, self.crop_pairs(), seed)
        return export_weights(network, NETWORKS)

    @staticmethod
    def load_hiding_networks(scheme: DeepWatermarking, key: Key) -> nn.Module:
        """Load H and R of a key, with the key's message."""
        network = make_placement(scheme)
        fill_network(network, key.frozen, NETWORKS, "networks are")
        return _Messenger(network, torch.from_numpy(key.message.astype("float32")))


class _Messenger(nn.Module):
    """H for one message, and R."""

    def __init__(self, network: Placement, message: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("_message", message)
        self._level = compute_level(network.scheme)

    def hide(self, images: Tensor) -> Tensor:
        """Return marked images (N, C, H, W) of images shaped alike."""
        bits = cast(Tensor, self._message).expand(len(images), -1)
        return self.network.hide_bits(images, bits, self._level)

    def reveal(self, images: Tensor) -> Tensor:
        """Return scores (N, T), or (N, shifts, T) where the reader searches for the shift."""
        if isinstance(self.network, TilePlacement) and self.network.scheme.register:
            return self.network.compute_shifted_scores(images)
        return self.network.compute_scores(images)

    def compute_mark_loss(self, images: Tensor) -> Tensor:
        """Return R's cross-entropy () for the message in images (N, C, H, W)."""
        bits = cast(Tensor, self._message).expand(len(images), -1)
        return F.binary_cross_entropy_with_logits(self.network.compute_scores(images), bits)


def train_networks(
    scheme: DeepWatermarking, outputs: Tensor, seed: int, saving: TrainingStore | None = None
) -> Placement:
    """Train H and R on images uint8 (N, C, H, W); return them frozen, at the scheme's PSNR."""
    # Initial weights come from the global generator; the caller's random numbers must not change.
    with torch.random.fork_rng(devices=[]):
        course = _HidingCourse(scheme, outputs, seed)
        course.restore(saving.load() if saving else None)
        with torch.enable_grad(), show_progress("training H and R", scheme.steps) as advance:
            advance(course.step)
            while course.step < scheme.steps:
                before = course.step
                course.take_step()
                # A new attempt begins at step 0, so the progress can be negative.
                advance(course.step - before)
                if saving and (saving.due() or course.step == scheme.steps):
                    saving.save(course.export_state())
    network = course.network.eval().requires_grad_(False)
    calibrate(network, outputs, seed)
    return network


def train_adversarially(network: Placement, pairs: tuple[Tensor, Tensor], seed: int) -> None:
    """Run the adversarial stage: train R alone on what surrogates make of marked images.

    Differs from the paper: each teacher bears a random message of its own, and R also reads marked
    images with other messages. With a single teacher R would learn its message (the scheme's page).

    Args:
        network: H and R, frozen.
        pairs: inputs and outputs uint8 (N, C, S, S).
        seed: of messages and training.
    """
    scheme, generator = network.scheme, torch.Generator().manual_seed(seed)
    copies = []
    for number, architecture in enumerate(scheme.teachers):
        bits = torch.randint(0, 2, (scheme.bits,), generator=generator).float()
        marked = convert_in_parts(pairs[1], partial(_mark_images, network, bits))
        copying = CopyingOptions(
            architecture, steps=scheme.teacher_steps, batch=scheme.batch, seed=seed + number,
            precision=scheme.precision,
        )  # fmt: skip
        copies.append((bits, run_network(train_surrogate(pairs[0], marked, copying), pairs[0])))
    # All teachers are trained before R, so that R sees their copies in turn.
    _tune_revealer(network, pairs[1], copies, seed)


def _mark_images(network: Placement, bits: Tensor, images: Tensor) -> Tensor:
    """Return images (N, C, H, W) marked with the same bits (T,)."""
    return network.hide_bits(images, bits.expand(len(images), -1), compute_level(network.scheme))


def convert_in_parts(images: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to images uint8 (N, C, H, W), a few at a time; return 8-bit images.

    The function takes and returns images with levels 0 to 1.
    """
    parts = [images[first : first + _PART] for first in range(0, len(images), _PART)]
    with torch.no_grad():
        return torch.cat([round_to_uint8(made(part.float() / 255)) for part in parts])


def _tune_revealer(
    network: Placement, outputs: Tensor, copies: Sequence[tuple[Tensor, Tensor]], seed: int
) -> None:
    """Train R on batches that are half copies with their messages, half freshly marked."""
    scheme, generator = network.scheme, torch.Generator().manual_seed(seed)
    half, steps = max(1, scheme.batch // 2), max(1, round(_TUNED * scheme.teacher_steps))
    reader = list(network.iterate_reader_parameters())
    # The networks arrive frozen; only R is trained again.
    for each in reader:
        each.requires_grad_(True)
    optimizer = torch.optim.Adam(reader, _TUNING_RATE)
    with torch.enable_grad(), show_progress("training R on copies", steps) as advance:
        for step in range(steps):
            message, copied_images = copies[step % len(copies)]
            rows = torch.randint(len(copied_images), (half,), generator=generator)
            images = cut_squares(outputs, half, scheme.side, generator)
            bits = torch.randint(0, 2, (half, scheme.bits), generator=generator).float()
            with torch.no_grad():
                marked = network.hide_bits(images, bits, compute_level(scheme))
            shown = torch.cat([copied_images[rows].float() / 255, marked])
            wanted = torch.cat([message.expand(half, -1), bits])
            with make_autocast(scheme):
                read = network.compute_scores(shown)
            loss = F.binary_cross_entropy_with_logits(read.float(), wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            advance(1)
    network.eval().requires_grad_(False)


def make_autocast(scheme: DeepWatermarking) -> torch.autocast:
    """Return the autocast context of a scheme's training precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=scheme.precision == "bf16")


def calibrate(network: Placement, outputs: Tensor, seed: int) -> None:
    """Scale H's residual so that 8-bit images have the scheme's PSNR on average."""
    scheme, generator = network.scheme, torch.Generator().manual_seed(seed)
    images = cut_squares(outputs, _CALIBRATED_ON, scheme.side, generator)
    bits = torch.randint(0, 2, (len(images), scheme.bits), generator=generator).float()
    wanted = compute_level(scheme)
    with torch.no_grad():
        for _ in range(3):
            found = round_to_uint8(network.hide_bits(images, bits, wanted)).float() / 255
            network.gain.mul_(wanted / (found - images).square().mean().sqrt())


def compute_loudness(scheme: DeepWatermarking, gone: float) -> float:
    """Return the root mean square of H's residual at a share `gone` of the training.

    It begins loud and fades to the scheme's level, except for the placement "everywhere", which
    computes its features again from the marked image.
    """
    if scheme.placement == "everywhere":
        return compute_level(scheme)
    faded = min(1.0, gone / _FADED)
    return float(10 ** (-(_LOUD + (scheme.psnr - _LOUD) * faded) / 20))


def compute_level(scheme: DeepWatermarking) -> float:
    """Return the root mean square of H's residual at the scheme's PSNR, white being 1."""
    return float(10 ** (-scheme.psnr / 20))


class _HidingCourse:
    """The state of one training of H and R, and its steps."""

    def __init__(self, scheme: DeepWatermarking, outputs: Tensor, seed: int) -> None:
        self.scheme, self._outputs, self._seed = scheme, outputs, seed
        self._begin_attempt(0)

    def _begin_attempt(self, attempt: int) -> None:
        """Begin an attempt with its own weights and batches, and forget the previous attempt."""
        seed = self._seed + attempt
        torch.manual_seed(seed)
        self.network = make_placement(self.scheme).train()
        # The running loss begins at ln 2, the loss of guesses.
        self.step, self._attempt, self._loss = 0, attempt, math.log(2)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(self.network.parameters(), _RATE)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, self.scheme.steps
        )

    def take_step(self) -> None:
        """Hide random messages, damage the images, read them; begin anew if R reads nothing.

        One of 130 small trainings got stuck: R only guessed, so that H got no useful gradient.
        """
        self._loss += _RECENT * (self._take_optimizer_step() - self._loss)
        asked = max(_PATIENT, self.scheme.steps // _BEGUN)
        if self.step == asked and self._loss > _GUESSES and self._attempt + 1 < _TRIES:
            self._begin_attempt(self._attempt + 1)

    def _take_optimizer_step(self) -> float:
        """Take one optimizer step; return R's loss."""
        scheme, gone = self.scheme, self.step / self.scheme.steps
        # A seed a step, from the saved generator, makes a resumed training the same.
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
        images = cut_squares(self._outputs, scheme.batch, scheme.side, self._generator)
        together = scheme.together if scheme.placement == "tile" else 1
        # Groups of `together` images bear one message: the damage takes means over them.
        drawn = torch.randint(
            0, 2, (-(-len(images) // together), scheme.bits), generator=self._generator
        )
        bits = drawn.float().repeat_interleave(together, 0)[: len(images)]
        level = compute_loudness(scheme, gone)
        with make_autocast(scheme):
            marked = self.network.hide_bits(images, bits, level)
            read = self.network.compute_scores(self._damage_images(images, marked, gone))
        missed = F.binary_cross_entropy_with_logits(read.float(), bits)
        loss = missed + min(1.0, gone / _FADED) * _LIKENESS * (
            1 - compute_ssim(marked, images).mean()
        )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        return missed.item()

    def _damage_images(self, images: Tensor, marked: Tensor, gone: float) -> Tensor:
        """Damage the mark as a surrogate does: average over a group, make fainter, add noise."""
        # No damage while the mark still fades: R must find the mark first.
        if gone < _FADED:
            return marked
        each, added = (len(images), 1, 1, 1), marked - images
        if self.scheme.together > 1 and self.scheme.placement == "tile":
            own = torch.rand(each)
            added = own * added + (1 - own) * average_groups(added, self.scheme.together)
        strength = _FAINTEST + (1 - _FAINTEST) * torch.rand(each)
        found = images + strength * added
        found = found + _NOISE * torch.rand(each) * torch.randn_like(found)
        return jitter_images(found, _MOVED / self.scheme.grid_size) if self.scheme.jitter else found

    def export_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
            "step": self.step,
            "attempt": self._attempt,
            "loss": self._loss,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved state; None begins at step 0."""
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        self.step, self._attempt, self._loss = state["step"], state["attempt"], state["loss"]


def average_groups(added: Tensor, together: int) -> Tensor:
    """Replace residuals (N, C, H, W) by the mean of each group of images with the same message."""
    groups = torch.split(added, together)
    return torch.cat([each.mean(0, keepdim=True).expand_as(each) for each in groups])


def jitter_images(images: Tensor, share: float) -> Tensor:
    """Shift and enlarge each image (N, C, H, W) by one random affine map.

    The visible square is smaller than the image by at most `share` of the side, so that nothing
    moves by more than that share.
    """
    count = len(images)
    scale = 1 - share * torch.rand(count)
    shift = (1 - scale)[:, None] * (2 * torch.rand(count, 2) - 1)
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = scale
    maps[:, :, 2] = shift
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
