"""Conv-4's loss with its gradient and the gradient's derivative, written out: the speed of MAML on a CPU.

Its features have a gradient written out likewise, for members that judge by features alone.

Plain autograd composes the derivative of a gradient from hundreds of small operations, which all read and write memory.
Here a support or query pass is one operation, with three savings:

- Activations are rows [pixels, channels], which convolutions read as channels_last: pooling and sums over pixels are
  many times faster so, in all derivatives.
- Pooling goes before the affine part of the normalisation, which is monotone per channel, so that what follows works
  on a quarter of the pixels.
- Since a Hessian is symmetric, what the second derivative sends back is the derivative of the gradient along a
  direction. That takes 3 convolutions per layer of twice the size, where autograd's order takes 8 single ones.

Under `torch.func.vmap` the tasks share each call that their own weights do not forbid: all their pixels are normalised
together, and weights that are not yet a task's own convolve all images at once.

- `rows`: the arithmetic of such rows
- `form`, `packing`: sizes and records, and the flat lists of tensors that autograd takes
- `passes`: the formulas of loss, gradient and second derivative
- `functions`: the same for autograd and torch.func
- `evaluation`: features that nobody differentiates
"""

from metaft.models.fused.evaluation import conv4_features, first_layer_once
from metaft.models.fused.functions import conv4_embedded, conv4_loss
from metaft.models.fused.rows import moments

__all__ = ["conv4_embedded", "conv4_features", "conv4_loss", "first_layer_once", "moments"]
