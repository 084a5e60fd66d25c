"""Embedding into outputs: a barrier behind a network marks every image that leaves it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from countermark.embedding.base import Embedding, to_arrays, to_tensors
from countermark.errors import ConfigError, LoopError
from countermark.keys.key import Key, KeyMaterial
from countermark.keys.key_place import UnfinishedKey
from countermark.predictors.base import Images
from countermark.results.reading import Reading
from countermark.schemes.outputs import OutputScheme
from countermark.schemes.outputs_training import KeyNetworks, TrainingStore

_READ = 128  # at most so many images are marked and read to check a new mark


class OutputEmbedding(Embedding):
    """A context manager that makes a mark for the images that a network outputs.

    The network's weights stay unchanged, unless the network learns the mark with `absorb`. The
    hiding network H and the revealing network R are trained on the first call of `wrap` or
    `absorb`.

    Args:
        scheme: the output scheme to embed.
        model: the network, from images to images with levels 0 to 1.
        owner: the name of the mark's owner.
        outputs: images uint8 (N, C, H, W) like those that the network makes.
        inputs: the images that `outputs` were made from, in the same order; teachers of R need
            them.
        material: secret and nonce of an interrupted embedding; drawn if None.
        siblings: images (n, C, H, W) made by each of several unmarked networks, for a form of the
            scheme that is judged by unmarked networks and can claim nothing without them.
        place: where to save the key when the block ends; None leaves saving to the caller.

    Raises:
        ConfigError: the outputs do not fit the scheme, or siblings are given to a scheme that is
            not judged by unmarked networks.
    """

    begins = "wrap() was never called: call served = mark.wrap(model) inside the block"
    forgotten = begins
    fields = frozenset({"frozen", "learnt"})

    def __init__(  # noqa: PLR0913 - what goes in and out, and what it is compared with
        self, scheme: OutputScheme, model: nn.Module, *, owner: str, outputs: Images | Tensor,
        inputs: Images | Tensor | None = None, material: KeyMaterial | None = None,
        siblings: Sequence[Images] = (), place: UnfinishedKey | None = None,
    ) -> None:  # fmt: skip
        begun = Key(scheme.name, scheme.to_fields(), {}, owner, material or KeyMaterial.generate())
        super().__init__(model, begun=begun, material=material, place=place)
        self._scheme, self._outputs = scheme, torch.as_tensor(outputs)
        self._inputs = None if inputs is None else torch.as_tensor(inputs)
        self._siblings = list(siblings)
        self._key: Key | None = None
        # Callers set it if the training of H and R shall survive an interruption.
        self.saving: TrainingStore | None = None
        self._check_images()

    def wrap(self, model: nn.Module | None = None) -> Barrier:
        """Return a network whose output images are all marked; serve this network.

        Args:
            model: another network for the same task; None takes the model of the embedding.

        Raises:
            LoopError: the block is not open.
        """
        self.require_open()
        return Barrier(model or self._model, self._train_networks())

    def absorb(self, outputs: Tensor, targets: Tensor, strength: float = 1.0) -> Tensor:
        """Return the loss () of a network that learns task and mark together and needs no barrier.

        Args:
            outputs: the network's output (N, C, H, W), levels 0 to 1.
            targets: the output that it should have made without a mark, shaped alike.
            strength: 1 for a mark as loud as the barrier's; less costs the task less.

        Raises:
            ConfigError: strength is not above 0 and at most 1.
            LoopError: the block is not open.
        """
        self.require_open()
        if not 0 < strength <= 1:
            raise ConfigError(
                f"strength is {strength}: expected more than 0, and 1 for a mark as loud as the "
                "barrier's"
            )
        return self._train_networks().compute_absorption_loss(outputs, targets, strength)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `LoopError`: see `add_gradient`."""
        self.add_gradient(optimizer)

    def add_gradient(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Raise `LoopError`: a mark in outputs has no gradient of its own.

        Raises:
            LoopError: always.
        """
        raise LoopError(
            f"{self._scheme.name} lives in the outputs, not in the loss: serve mark.wrap(model), "
            "or train the network with mark.absorb(outputs, targets)"
        )

    def read(self) -> Reading | None:
        """Read the mark from freshly marked images; return None if there is no key yet."""
        return None if self._key is None else self._extract_reading(self._key)

    @property
    def drawn_key(self) -> Key | None:
        """The key as soon as H and R are trained; for measuring only."""
        return (
            None if self._key is None else self._scheme.with_calibration(self._key, self._siblings)
        )

    def embedding_failure(self, key: Key) -> str | None:
        """Return why the mark would not be found in marked images, or None if it would."""
        # The mark itself may be there; only its significance cannot be judged.
        if self._scheme.needs_siblings and not self._siblings:
            warnings.warn(
                "what this picture is worth is known only by images that unmarked networks of the "
                "same task made: give siblings, or verify will answer no_verdict",
                stacklevel=3,
            )
        return self._scheme.embedding_failure(self._extract_reading(key))

    def export_family_state(self) -> dict[str, Any]:
        """Return the frozen and the learnt tensors of the key."""
        key = self._key
        return {
            "frozen": {} if key is None else to_tensors(key.frozen),
            "learnt": {} if key is None else to_tensors(key.learnt),
        }

    def restore_family(self, state: Mapping[str, Any]) -> None:
        """Take the networks of the state, without training them again."""
        if state["commitment"] is None:
            return
        key = self._generate_key(to_arrays(state["frozen"]), to_arrays(state["learnt"]))
        self.require_commitment(key, state)
        # `self._key` is set last: an error leaves the embedding as it was.
        self._scheme.load_networks(key)  # raises if a network is damaged
        self.note_drawn_key(key)
        self._key = key

    def _get_drawn_key(self) -> Key | None:
        return self._key

    def _train_networks(self) -> KeyNetworks:
        """Return the key's networks; train them first if there is no key yet."""
        self._called = True
        if self._key is None:
            training = self._scheme.load_training_class()(
                self._scheme, self._material, (self._outputs, self._inputs), self.saving
            )
            before = self._place and self._place.drawn  # the key that an interrupted run drew
            key = self._generate_key(
                dict(before.frozen) if before else training.make_pre_commit_tensors(), {}
            )
            self.note_drawn_key(key)
            # An interrupted run may have trained H and R already.
            learnt = dict(before.learnt) if before else {}
            # Learnt tensors enter C1 and may depend on C0, so the key is drawn first.
            if learnt := learnt or training.make_post_commit_tensors(key):
                key = self._generate_key(key.frozen, learnt)
                self.note_drawn_key(key)
            self._key = key
        return cast(KeyNetworks, self._scheme.load_networks(self._key))

    def _generate_key(
        self, frozen: Mapping[str, NDArray[Any]], learnt: Mapping[str, NDArray[Any]]
    ) -> Key:
        """Generate the key of frozen tensors, with the learnt tensors if there are any."""
        key = self._scheme.generate_key(frozen, owner=self._owner, material=self._material)
        return replace(key, learnt=learnt) if learnt else key

    def _extract_reading(self, key: Key) -> Reading:
        """Mark some of the outputs and read the mark from them."""
        # The check marks images itself: the network's weights bear no mark.
        images = self._outputs[:_READ].numpy()
        return self._scheme.extract(self._scheme.mark_outputs(images, key), key)

    def _check_images(self) -> None:
        """Raise `ConfigError` if outputs, inputs or siblings do not fit the scheme."""
        outputs, channels = self._outputs, self._scheme.channels
        if outputs.dtype != torch.uint8 or outputs.dim() != 4 or outputs.shape[1] != channels:
            raise ConfigError(
                f"outputs are {outputs.dtype} {list(outputs.shape)}: expected images uint8 "
                f"{['N', channels, 'H', 'W']}, as channels={channels} says"
            )
        self._scheme.check_outputs((outputs.shape[2], outputs.shape[3]))
        if self._inputs is not None and self._inputs.shape != outputs.shape:
            raise ConfigError(
                f"inputs are {list(self._inputs.shape)}, outputs {list(outputs.shape)}: expected "
                "an input of the same size for each output"
            )
        if self._siblings and not self._scheme.needs_siblings:
            raise ConfigError(
                f"{self._scheme.name} is not judged by unmarked networks: leave siblings out"
            )


class Barrier(nn.Module):
    """A network with the barrier behind it: images in, marked images with levels 0 to 1 out.

    The marking networks are not in its state dict, so that a saved model file never holds the key.
    """

    def __init__(self, model: nn.Module, live: KeyNetworks) -> None:
        super().__init__()
        self.model = model
        # A plain method, not a submodule: `state_dict` must not hold the key's networks.
        self._marks = live.mark_tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output images, marked."""
        return self._marks(self.model(images))
