"""How an island takes in outer steps that were under way while it went on computing.

Streaming DiLoCo (arXiv 2501.18512) mixes what arrives with what the island has by now; eager updates (arXiv 2502.12996)
let the island's own part of an outer step count at once. Neither changes the global model, which is the log's. It does
not know how long a step was under way.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import CHUNK_VALUES, Codec
from diloco_ray.algorithm.fragments import Fragment
from diloco_ray.algorithm.outer_optimizer import OuterOptimizer


def merge_(fragment: Fragment, arrived: Tensor, tensors: Mapping[str, Tensor], mixing: float) -> None:
    """theta <- alpha theta + (1 - alpha) Theta, in place in the model's tensors; autograd sees nothing.

    Streaming DiLoCo, Algorithm 2: alpha, in 0..1, is the mixing, Theta what arrived, (num_values,) float32 on the CPU.
    With alpha = 0 it is `Fragment.scatter_`, bit for bit. Computed in float32 where the tensors are, one at a time, and
    rounded to their dtype. A model that does not fit is left as it was: RunMismatchError.
    """
    if mixing == 0.0:
        fragment.scatter_(arrived, tensors)
        return
    targets = [slot.tensor_in(tensors) for slot in fragment.slots]
    with torch.no_grad():
        for slot, target in zip(fragment.slots, targets):
            theirs = slot.of(arrived).to(target.device).mul(1 - mixing)
            target.copy_(theirs.add_(target.float().mul(mixing)))


class EagerCorrection:
    """What separates an island's own replica from the global one, under eager updates. One fragment, one island.

    With d(t) the island's own decoded contribution to round t and M_t the number of contributions, it steps along

        g~(t) = mean(t-1) + e(t),   e(t) = d(t) / M_t - d(t-1) / M_{t-1},   d(-1) = mean(-1) = 0

    (arXiv 2502.12996). A linear optimizer takes the state x = (theta, buffers) to A x + B g. Let X be the global state,
    stepped along mean(t-1), and y the offset's, stepped along e(t), from y = 0. Then the own state is x = X + y always:

        A x + B g~(t) = A (X + y) + B (mean(t-1) + e(t)) = (A X + B mean(t-1)) + (A y + B e(t)).

    So the offset is kept instead of an own replica, and steps on records stay what they are. d is the decoded payload,
    not the exact outer gradient: an own part that others have quantised would drift away from it like a random walk.
    The optimizer must be linear (`OuterSettings.is_linear`). A new object belongs to an island that contributes for the
    first time: the offset is zero.
    """

    def __init__(self, num_values: int, optimizer: OuterOptimizer, uplink: Codec):
        self._optimizer, self._uplink = optimizer, uplink
        self._offset = torch.zeros(num_values)
        self._buffers = tuple(torch.zeros(num_values) for _ in optimizer.buffer_names)
        self._num_steps = 0
        self._former: tuple[Tensor, float] | None = None  # payload of d(t-1), 1 / M_{t-1}

    def step_(self, payload: Tensor, num_islands: int) -> None:
        """One step of the offset along e(t). payload: d(t) as the uplink encodes it, kept until the next step.

        num_islands, M_t, is how many contributions this round is expected to have. What it has in the end does not
        matter: the next step takes back just what this one adds.
        """
        num_values, present = self._offset.numel(), (payload, 1 / num_islands)
        self._num_steps += 1
        e, scratch = torch.empty(2, min(CHUNK_VALUES, num_values))
        for start in range(0, num_values, CHUNK_VALUES):
            here = slice(start, min(start + CHUNK_VALUES, num_values))
            e, scratch = e[: here.stop - start], scratch[: here.stop - start]
            self._uplink.decode_(present[0], start, num_values, e, present[1])
            if self._former is not None:
                self._uplink.decode_(self._former[0], start, num_values, scratch, self._former[1])
                e.sub_(scratch)
            buffers = tuple(buffer[here] for buffer in self._buffers)
            self._optimizer.step_(self._offset[here], e, buffers, self._num_steps, scratch)
        self._former = present

    def add_to_(self, values: Tensor) -> None:
        """values + offset, in place: from the global parameters, (num_values,) float32, to the island's own."""
        values.add_(self._offset)
