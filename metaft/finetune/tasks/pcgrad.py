"""Gradients without what they have against one another."""

from __future__ import annotations

import torch

from metaft.finetune.tasks.base import Combined, Given


def pcgrad(given: Given) -> Combined:
    """Yu et al. 2020, https://arxiv.org/abs/2001.06782, algorithm 1: of each target's gradient g_i, wherever its
    product with another one's g_j is below 0, what is along g_j is taken out, g_i - (g_i . g_j / |g_j|^2) g_j, for the
    others in a random order. Those are the gradients as they were; the sum of what is left is the step. Of the shared
    parameters alone: a head has one gradient."""
    shared = torch.zeros_like(given.gradients[0])
    for mine, others in zip(given.gradients, given.orders, strict=True):
        for other in others:
            theirs = given.gradients[other]
            along = mine @ theirs
            if along < 0:  # hence neither is zero
                mine = mine - along / (theirs @ theirs) * theirs
        shared += mine
    return Combined(shared, torch.ones_like(given.losses), torch.zeros_like(given.log_variances))
