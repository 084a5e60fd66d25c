"""The detector that both attacks train: selected features and a support vector machine."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from countermark.errors import ConfigError, MissingExtraError
from countermark_lab.steganalysis.images import Flags, Images, check_images
from countermark_lab.steganalysis.rates import DetectionResult
from countermark_lab.steganalysis.spam import Colour, Form, compute_spam_features


def require_sklearn() -> None:
    """Check that scikit-learn is installed, before minutes of embedding.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn.svm  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("training a steganalyser", "stego") from error


@dataclass(frozen=True)
class Detector:
    """A configuration of standardised SPAM features, selected by F value, and an RBF-SVM.

    The kernel is exp(−|x − y|²/d) on d selected features, which have variance 1.

    Attributes:
        form: form of the features, see `compute_spam_features`.
        colour: treatment of colour, see `compute_spam_features`.
        select: the largest number of features that the SVM reads.
        penalty: C of the SVM.
    """

    form: Form = "cooccurrence"
    colour: Colour = "average"
    select: int = 500
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.select < 1 or not 0 < self.penalty < np.inf:
            raise ConfigError(
                "a detector selects 1 feature or more and has a penalty above 0, "
                f"got select={self.select}, penalty={self.penalty}"
            )

    def compute_features(self, images: Images) -> NDArray[np.float64]:
        """Return the features of the images, float64 (n, F)."""
        return compute_spam_features(images, form=self.form, colour=self.colour).astype(np.float64)

    def fit(self, covers: Images, stego: Images) -> TrainedDetector:
        """Train on images that count as covers and images that count as stego, (n, C, H, W) each.

        Training draws nothing at random: equal images give equal detectors.

        Raises:
            ConfigError: fewer than two images of a kind, different shapes, or equal features in all
                images.
            MissingExtraError: scikit-learn is not installed.
        """
        if (
            check_images(covers).shape[1:] != check_images(stego).shape[1:]
            or min(len(covers), len(stego)) < 2
        ):
            raise ConfigError(
                "training needs two images or more of each kind, of one shape, "
                f"got {covers.shape} and {stego.shape}"
            )
        features = np.concatenate([self.compute_features(covers), self.compute_features(stego)])
        answers = np.repeat([False, True], [len(covers), len(stego)])
        # A constant feature tells nothing, and its F value is undefined.
        varying = np.ptp(features, axis=0) > 0
        if not varying.any():
            raise ConfigError("the images all have the same features: nothing tells them apart")
        selected = min(self.select, int(varying.sum()))
        model = self._fit_classifier(features[:, varying], answers, selected)
        return TrainedDetector(self, model, varying, selected, covers.shape[1:])

    def _fit_classifier(self, features: NDArray[np.float64], answers: Flags, selected: int) -> Any:
        """Return the trained scikit-learn pipeline."""
        require_sklearn()
        # Imported here: scikit-learn belongs to an extra and loads slowly.
        from sklearn.feature_selection import SelectKBest, f_classif
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        select, machine = SelectKBest(f_classif, k=selected), SVC(C=self.penalty, kernel="rbf")
        with warnings.catch_warnings():
            # A feature that is constant within both kinds rightly has F = ∞ or 0/0.
            warnings.filterwarnings("ignore", message="Features .* are constant")
            warnings.filterwarnings("ignore", message="(divide by zero|invalid value)")
            return make_pipeline(StandardScaler(), select, machine).fit(features, answers)


@dataclass(frozen=True, eq=False)
class TrainedDetector:
    """A trained detector; `Detector.fit` makes it.

    Attributes:
        detector: the configuration.
        model: the scikit-learn pipeline.
        varying: (F,) true for the features that vary in the training images.
        selected: number of features that the SVM reads.
        image_size: (C, H, W) of the training images.
    """

    detector: Detector
    model: Any
    varying: Flags
    selected: int
    image_size: tuple[int, int, int]

    def detect(self, images: Images) -> DetectionResult:
        """Return which of the images (n, C, H, W) are classified as stego images.

        Raises:
            ConfigError: the images do not have the shape of the training images.
        """
        # The noise of the features depends on the number of pixels.
        if check_images(images).shape[1:] != self.image_size:
            raise ConfigError(
                f"trained on images {self.image_size}, got {images.shape[1:]}: use one size"
            )
        features = self.detector.compute_features(images)[:, self.varying]
        called = np.asarray(self.model.predict(features), dtype=np.bool_)
        return DetectionResult(called, len(self.varying), self.selected, self.image_size)
