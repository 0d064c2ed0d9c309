"""Outer optimizers: one step of the global parameters theta along the combined outer gradient g.

g = base - island is descended like any gradient. Conventions of torch.optim, so that its results are the oracle.
Every replica takes the same step and must arrive at the same bits, hence single float32 operations only: no
add(alpha=), addcmul or lerp, which some processors fuse and others do not. An optimizer here holds numbers, no state:
buffers belong to the replica. It does not know fragments, islands or versions.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class OuterOptimizer(Protocol):
    """step_ changes theta and the buffers, all (m,) float32, in place; g is left as it was; scratch is as long.

    The buffers, named by buffer_names, start as zeros. step counts this fragment's outer steps from 1.
    Elementwise: a vector may be stepped in chunks of any length.
    """

    name: ClassVar[str]
    buffer_names: ClassVar[tuple[str, ...]]

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None: ...


@dataclass(frozen=True)
class SGD:
    """theta <- theta - eta g.   With eta = 1 this is federated averaging (McMahan et al., arXiv 1602.05629)."""

    learning_rate: float = 1.0
    name: ClassVar[str] = "sgd"
    buffer_names: ClassVar[tuple[str, ...]] = ()

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None:
        torch.mul(g, self.learning_rate, out=scratch)
        theta.sub_(scratch)


@dataclass(frozen=True)
class HeavyBall:
    """b <- mu b + g,   theta <- theta - eta b.   Momentum as in FedAvgM (Hsu et al., arXiv 1909.06335)."""

    learning_rate: float = 0.7
    momentum: float = 0.9
    name: ClassVar[str] = "heavy_ball"
    buffer_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None:
        (b,) = buffers
        b.mul_(self.momentum).add_(g)
        torch.mul(b, self.learning_rate, out=scratch)
        theta.sub_(scratch)


@dataclass(frozen=True)
class Nesterov:
    """b <- mu b + g,   theta <- theta - eta (g + mu b).

    OuterOpt of DiLoCo (arXiv 2311.08105, Algorithm 1) with its eta 0.7, mu 0.9, in the form of Sutskever et al.
    (ICML 2013) that torch.optim.SGD(nesterov=True, dampening=0) has.
    """

    learning_rate: float = 0.7
    momentum: float = 0.9
    name: ClassVar[str] = "nesterov"
    buffer_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None:
        (b,) = buffers
        b.mul_(self.momentum).add_(g)
        torch.mul(b, self.momentum, out=scratch)
        theta.sub_(scratch.add_(g).mul_(self.learning_rate))


@dataclass(frozen=True)
class DelayedNesterov:
    """acc <- acc + g,   theta <- theta - eps g / N,   but at every N-th step

        m <- beta m + acc / N,   theta <- theta - eps (beta m + g / N),   acc <- 0.

    Delayed Nesterov of Liu et al. (arXiv 2401.09135) with c = 0, for outer gradients that arrive one by one: N of them
    add up to one Nesterov step on their mean, where momentum at every arrival would count each of them N times.
    """

    learning_rate: float
    momentum: float
    arrivals: int  # N
    name: ClassVar[str] = "delayed_nesterov"
    buffer_names: ClassVar[tuple[str, ...]] = ("momentum", "accumulated")

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None:
        m, acc = buffers
        acc.add_(g)
        torch.div(g, self.arrivals, out=scratch)
        if step % self.arrivals == 0:
            m.mul_(self.momentum).add_(acc.div_(self.arrivals))
            scratch.add_(torch.mul(m, self.momentum, out=acc))
            acc.zero_()
        theta.sub_(scratch.mul_(self.learning_rate))


@dataclass(frozen=True)
class Adam:
    """m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,

        theta <- theta - eta / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon).

    Kingma and Ba (arXiv 1412.6980, Algorithm 1); as an outer optimizer FedAdam (Reddi et al., arXiv 2003.00295,
    Algorithm 2). Among DiLoCo's outer optimizers (arXiv 2311.08105) it was stable only with epsilon near 0.1.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 0.1
    name: ClassVar[str] = "adam"
    buffer_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def step_(self, theta: Tensor, g: Tensor, buffers: tuple[Tensor, ...], step: int, scratch: Tensor) -> None:
        m, v = buffers
        # In float64 on the host: what the last bit of some machine's pow says is lost in the rounding to float32.
        learning_rate = self.learning_rate / (1 - self.beta1**step)
        inverse_root = 1 / math.sqrt(1 - self.beta2**step)
        torch.mul(g, 1 - self.beta1, out=scratch)
        m.mul_(self.beta1).add_(scratch)
        torch.mul(g, g, out=scratch)
        v.mul_(self.beta2).add_(scratch.mul_(1 - self.beta2))
        torch.sqrt(v, out=scratch)
        scratch.mul_(inverse_root).add_(self.epsilon)
        torch.div(m, scratch, out=scratch)
        theta.sub_(scratch.mul_(learning_rate))
