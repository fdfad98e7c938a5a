"""Losses weighted by learned uncertainties."""

from __future__ import annotations

from metaft.finetune.tasks.base import Combined, Given


def uncertainty(given: Given) -> Combined:
    """L = sum_t exp(-s_t) L_t + s_t / 2 with s_t = log sigma_t^2, which begins at 0.

    Kendall, Gal & Cipolla 2018, https://arxiv.org/abs/1705.07115, the terms of a classification in equation 10 (which
    is by sigma), in the log-variance that section 3.2 has the network learn: dL/ds_t = 1/2 - exp(-s_t) L_t, which is 0
    at exp(s_t) = 2 L_t.
    """
    weights = (-given.log_variances).exp()
    return Combined(weights @ given.gradients, weights, 0.5 - weights * given.losses)
