"""Combining: the contributions of several islands become the one outer gradient of a step.

The averaging step of DiLoCo (arXiv 2311.08105, Algorithm 1), weighted where islands did unequal work:

    g = sum_m (w_m / sum_j w_j) delta_m

It does not know where a weight comes from, nor who was left out.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from diloco_ray.algorithm.codecs import Codec


def weighted_mean_(
    payloads: Sequence[Tensor],
    weights: Sequence[float],
    codec: Codec,
    start: int,
    num_values: int,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """One chunk of the weighted mean of the decoded payloads, written to out, (m,) float32; scratch is as long.

    The sum runs in the order given: the caller gives island order, since a sum of floats depends on its order. Weights
    are positive, their sum is finite, otherwise ValueError. The factor of a single contribution is exactly 1.
    """
    total = sum(weights)
    if not payloads or len(payloads) != len(weights) or not all(weight > 0 for weight in weights) or total == math.inf:
        raise ValueError(f"{len(payloads)} contributions with weights {list(weights)}: one positive weight each")
    for position, (payload, weight) in enumerate(zip(payloads, weights)):
        codec.decode_(payload, start, num_values, scratch if position else out, weight / total)
        if position:
            out.add_(scratch)
