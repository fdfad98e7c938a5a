"""The probe: logistic regression on frozen features, which fine-tuning has to be better than to be worth it."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import NonFiniteError
from metaft.finetune.examples import Prepared
from metaft.finetune.features import features_of
from metaft.finetune.fit import Fitted
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models.stored import with_stored_moments

STRENGTH = 1.0
"""Inverse of the penalty, scikit-learn's `C`, which is its default."""

ITERATIONS = 2000
"""Of lbfgs; what has not converged by then predicts no better for it."""


def probe(body: nn.Module, inputs: Inputs, examples: Examples, labels: Tensor, classes: int) -> Fitted:
    """Logistic regression (scikit-learn's, L2 penalty, lbfgs) on the features of raw examples [n, ...], as a linear
    head over the body, whose normalisation has the moments of these examples stored where it has none of its own.

    Every class needs an example. Raises NonFiniteError where features are not finite.
    """
    like = next(body.parameters())
    x = Prepared(examples, inputs, like)
    body = with_stored_moments(body, x).eval()
    features = features_of(body, x)
    if not features.isfinite().all():
        raise NonFiniteError("probe: the features of the training images are not finite")
    weight, bias = _regression(features.cpu().double().numpy(), labels.cpu().numpy(), classes)
    with torch.device("meta"):  # the constructor would draw from the global generator
        head = nn.Linear(features.shape[1], classes)
    head = head.to_empty(device="cpu").to(features)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        assert head.bias is not None
        head.bias.copy_(torch.from_numpy(bias))
        loss = float(F.cross_entropy(head(features), labels.to(features.device)))
    return Fitted(body, head, [{"epoch": 0.0, "loss": loss}])


def _regression(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight [classes, D] and bias [classes] whose softmax are the probabilities of the fit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS).fit(features, labels)
    if classes == 2:  # one row for both, of the second class against the first
        return np.concatenate([0 * fit.coef_, fit.coef_]), np.concatenate([0 * fit.intercept_, fit.intercept_])
    return fit.coef_, fit.intercept_
