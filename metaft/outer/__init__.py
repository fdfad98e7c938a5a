"""The outer loop: the meta-gradient, what it does to the meta-parameters, and whole meta-steps in place."""

from metaft.outer.gradient import MetaGradient, meta_gradient, task_grad, task_grad_of

__all__ = ["MetaGradient", "meta_gradient", "task_grad", "task_grad_of"]
