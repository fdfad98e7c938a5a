"""The probe: logistic regression on frozen features (of numbers ridge regression), which fine-tuning has to be better
than to be worth it."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from metaft.errors import NonFiniteError
from metaft.finetune.examples import Prepared, like_of
from metaft.finetune.features import features_of
from metaft.finetune.fit import Fitted
from metaft.finetune.outcomes import outcome_of
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models import undrawn
from metaft.models.stored import with_stored_moments
from metaft.settings.finetuning import Recipe

STRENGTH = 1.0
"""Inverse of the penalty, scikit-learn's `C`, which is its default."""

PENALTIES = tuple(10.0**power for power in range(-3, 5))
"""Of ridge regression, scikit-learn's `alphas`."""

ITERATIONS = 2000
"""Of lbfgs; what has not converged by then predicts no better for it."""


def probe(body: nn.Module, inputs: Inputs, examples: Examples, labels: Tensor, classes: int) -> Fitted:
    """Logistic regression (scikit-learn's, L2 penalty, lbfgs) on the features of raw examples [n, ...], as a linear
    head over the body, whose normalisation has the moments of these examples stored where it has none of its own. Where
    `labels` are numbers (`classes` 0) it is ridge regression, the best of `PENALTIES` by its leave-one-out error.

    Every class needs an example. Raises NonFiniteError where features are not finite.
    """
    x = Prepared(examples, inputs, like_of(body))
    body = with_stored_moments(body, x).eval()
    features = features_of(body, x)
    if not features.isfinite().all():
        raise NonFiniteError("probe: the features of the training images are not finite")
    fit = regression if classes else _ridge
    weight, bias = fit(features.cpu().double().numpy(), labels.cpu().numpy(), classes)
    head = undrawn(lambda: nn.Linear(*reversed(weight.shape))).to(features)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        assert head.bias is not None
        head.bias.copy_(torch.from_numpy(bias))
        outcome = outcome_of(Recipe(), labels, classes, features)
        outputs = head(features)
        if classes == 0:  # in the same units as the losses of fits
            outputs = outcome.prepared(outputs)
        loss = float(outcome.loss(outputs, outcome.prepared(labels)))
    return Fitted(body, head, [{"epoch": 0.0, "loss": loss}])


def _ridge(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [1, D] and bias [1]."""
    from sklearn.linear_model import RidgeCV

    fit = RidgeCV(alphas=PENALTIES).fit(features, labels)
    return np.asarray(fit.coef_).reshape(1, -1), np.asarray(fit.intercept_).reshape(1)


def regression(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [classes, D] and bias [classes] whose softmax are the probabilities of the fit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS).fit(features, labels)
    if classes == 2:  # one row for both, of the second class against the first
        return np.concatenate([0 * fit.coef_, fit.coef_]), np.concatenate([0 * fit.intercept_, fit.intercept_])
    return fit.coef_, fit.intercept_
