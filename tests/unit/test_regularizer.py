"""The written-out gradients of the regularizer against autograd on the formula of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from countermark.keys.key import KeyMaterial
from countermark.schemes.bounded_training import bound_values
from countermark.schemes.uchida.scheme import Uchida
from countermark.schemes.uchida.training import UchidaTraining, compute_usual_spread

SHAPES = {"a": (10, 64), "b": (6, 3, 3, 3)}

FORMS: dict[str, dict[str, Any]] = {
    "bounded": {},
    "hinge": {"reading": "plain"},
    "hinge-margin": {"reading": "plain", "margin": 0.3, "strength": 0.7},
    "bce": {"regularizer": "bce"},
    "bce-random": {"regularizer": "bce", "key_type": "random", "strength": 0.05},
    "bce-direct-mean": {"regularizer": "bce", "key_type": "direct", "read": "filter_mean"},
    "hinge-diff": {"key_type": "diff"},
}


def by_the_formula(scheme: Uchida, training: UchidaTraining, weights: list[torch.Tensor]) -> Any:
    """λ·E_R, or the hinge, as the page of the scheme writes it, in float64."""
    mean = scheme.read == "filter_mean"
    if scheme.reading == "bounded":
        w = torch.cat([bound_values(each.reshape(-1), tuple(each.shape)) for each in weights])
    else:
        w = torch.cat([(each.mean(0) if mean else each).reshape(-1) for each in weights])
    blocks = scheme.generate_row_blocks(training.key)
    X = torch.from_numpy(np.concatenate([block.astype(np.float64) for block in blocks]))
    message = torch.from_numpy(training.key.message).double()
    y = X @ w.double()
    if scheme.regularizer == "bce":
        return scheme.strength * F.binary_cross_entropy_with_logits(y, message, reduction="sum")
    spread = compute_usual_spread(scheme, training.key) * torch.linalg.vector_norm(X[0])
    z = (2 * message - 1) * y / spread
    return scheme.strength * (scheme.margin - z).clamp(min=0).sum()


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_equal_autograd(form: str) -> None:
    scheme = Uchida(("a", "b"), 40, over_capacity=False, **FORMS[form])
    with pytest.warns(UserWarning, match="40 bits"):
        key = scheme.generate_key(SHAPES, owner="x", material=KeyMaterial.from_test_seed(1))
    training = UchidaTraining(scheme, key)
    generator = torch.Generator().manual_seed(1)
    weights = [
        (0.1 * torch.randn(shape, generator=generator)).requires_grad_()
        for shape in SHAPES.values()
    ]
    found, expected = training.loss(weights), by_the_formula(scheme, training, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(3 * found, weights),
        torch.autograd.grad(3 * expected, weights),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_margin_means_the_same_in_every_layer() -> None:
    """s is the standard deviation of z where weights have the variance 1 / fan-in."""
    scheme = Uchida("a", 256)
    key = scheme.generate_key({"a": (64, 300)}, owner="x", material=KeyMaterial.from_test_seed(1))
    weights = np.random.default_rng(0).normal(size=(64, 300)) / np.sqrt(300)
    X = np.concatenate(list(scheme.generate_row_blocks(key)))
    plain = replace(scheme, reading="plain")
    spread = compute_usual_spread(plain, key) * np.linalg.norm(X[0])
    assert np.std(X @ weights.reshape(-1)) / spread == pytest.approx(1, abs=0.1)
    spread = compute_usual_spread(scheme, key) * np.linalg.norm(X[0])
    assert np.std(scheme.compute_products({"a": 7 * weights}, key)) / spread == pytest.approx(
        1, abs=0.1
    )


def test_bfloat16_weights_are_read_in_float32() -> None:
    scheme = Uchida("a", 128)
    key = scheme.generate_key({"a": (10, 64)}, owner="x", material=KeyMaterial.from_test_seed(1))
    training = UchidaTraining(scheme, key)
    weight = torch.nn.Parameter(torch.full((10, 64), 0.1, dtype=torch.bfloat16))
    loss = training.loss([weight])
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
