"""What is said of the variants: the table of claims, and the arithmetic of a verdict.

Observed is loss / loss - 1, in percent, of two variants with the same seed: held-out loss of the last outer parameters.
Thresholds are what this size can show. The papers' figures are of models a thousand times larger; they stand beside
for orientation, as the paper gives them, and not to be compared digit by digit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.science.variants import VARIANTS, Variant

TIE = 0.3  # percent; paired differences scatter by 0.1 to 0.3 from seed to seed

Verdict = Literal["holds", "does not hold", "not claimed at this size"]


@dataclass(frozen=True)
class Claim:
    """`of` against `against`, names of variants; bounds in percent.

    asserted: the command fails where it does not hold. claimed = False: known not to show at this size, carried with
    what is seen.
    """

    of: str
    against: str
    at_least: float = -math.inf
    at_most: float = math.inf
    asserted: bool = True
    claimed: bool = True

    @property
    def variants(self) -> tuple[Variant, Variant]:
        return VARIANTS[self.of], VARIANTS[self.against]

    @property
    def needs_labels(self) -> bool:
        return any(variant.needs_labels for variant in self.variants)

    @property
    def threshold(self) -> str:
        if self.at_least == -self.at_most:
            return f"within {self.at_most:g} %" if self.claimed and self.at_most < math.inf else "none"
        bounds = [f">= {self.at_least:+g} %"] * (self.at_least > -math.inf)
        bounds += [f"<= {self.at_most:+g} %"] * (self.at_most < math.inf)
        return " and ".join(bounds)


@dataclass(frozen=True)
class Row:
    """Claims that one figure of a paper stands beside."""

    name: str
    paper: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Finding:
    """A claim and what was seen, in percent, one number per seed."""

    claim: Claim
    percents: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.percents) / len(self.percents)

    @property
    def verdict(self) -> Verdict:
        if not self.claim.claimed:
            return "not claimed at this size"
        return "holds" if self.claim.at_least <= self.mean <= self.claim.at_most else "does not hold"

    @property
    def fails(self) -> bool:
        return self.claim.asserted and self.verdict == "does not hold"

    @property
    def observed(self) -> str:
        spread = f" ({min(self.percents):+.2f} .. {max(self.percents):+.2f})" if len(self.percents) > 1 else ""
        return f"{self.mean:+.2f} %{spread}" + (", a tie" if abs(self.mean) < TIE else "")


def find(claim: Claim, of: Sequence[float], against: Sequence[float]) -> Finding:
    """of, against: losses by seed, from the first seed on; one of them may end earlier."""
    return Finding(claim, tuple(100 * (a / b - 1) for a, b in zip(of, against)))


def better(of: str, than: str) -> Claim:
    return Claim(of, than, at_most=-TIE)


def worse(of: str, than: str) -> Claim:
    return Claim(of, than, at_least=TIE)


def shown(claim: Claim) -> Claim:
    """With a verdict that nothing depends on."""
    return Claim(claim.of, claim.against, claim.at_least, claim.at_most, asserted=False)


def unclaimed(of: str, against: str) -> Claim:
    return Claim(of, against, asserted=False, claimed=False)


CORE = (
    Row(
        "single",
        "perplexity 15.02 to 16.23, 150M, k = 8 (arXiv 2311.08105)",
        (Claim("DiLoCo", "one worker", at_most=-3.5),),
    ),
    Row(
        "data-parallel",
        "loss +2.0 %, 35M, k = 4 (2503.09799); perplexity 15.02 to 15.30, 150M, k = 8 (2311.08105)",
        (Claim("DiLoCo", "data parallel", at_most=3),),
    ),
    Row(
        "fedavg",
        "Nesterov is the best outer optimizer (2311.08105)",
        (Claim("FedAvg", "DiLoCo", at_least=1),),
    ),
    Row(
        "H",
        "H = 1000 to H = 50: perplexity +2.9 % (2311.08105)",
        (worse("H = 100", "DiLoCo"), worse("H = 200", "H = 100"), worse("one worker", "H = 200")),
    ),
    Row(
        "k",
        "k = 8 to k = 4: perplexity 15.08 to 15.23 (2311.08105)",
        (Claim("k = 8", "DiLoCo", at_most=-2.5),),
    ),
    Row(
        "drop",
        "50 % dropped: perplexity at most +2.1 % (2311.08105)",
        (
            Claim("30 % dropped", "DiLoCo", at_most=2),
            Claim("50 % dropped", "DiLoCo", at_most=4),
            better("30 % dropped", "one worker"),
            better("50 % dropped", "one worker"),
        ),
    ),
    Row(
        "codecs",
        "4 bits as good as 16, 2 bits much worse (2501.18512, 2604.21428)",
        (
            Claim("int8", "DiLoCo", -0.4, 0.4),
            Claim("int4", "DiLoCo", -0.4, 0.4),
            Claim("e3m0", "DiLoCo", -0.4, 0.4),
            Claim("ternary", "DiLoCo", at_least=1),
        ),
    ),
    Row(
        "streaming",
        "loss 3.53 to 3.54, 35M (2501.18512)",
        (
            Claim("4 fragments, tau 0", "DiLoCo", -0.5, 0.5),
            Claim("4 fragments, tau 5", "DiLoCo", at_most=2),
            unclaimed("4 fragments, tau 5, 0.7 / 0.9", "DiLoCo"),
            unclaimed("4 fragments, tau 5, no mixing", "DiLoCo"),
        ),
    ),
    Row(
        "eager",
        "eager 2.69, naive delay 3.01, no delay 2.67, 500M (2502.12996)",
        (
            Claim("eager 0.2 / 0.9", "delayed 0.2 / 0.9", at_most=-2),
            Claim("eager SGD 1", "delayed SGD 1", at_most=-4),
            unclaimed("eager 0.2 / 0.9", "DiLoCo"),
        ),
    ),
    Row(
        "non-iid",
        "no difference at the end: perplexity 15.02 to 15.08, 150M, k = 8 (2311.08105)",
        (Claim("a label per island", "DiLoCo", 1, 7), Claim("a label per island", "one worker", at_most=-3)),
    ),
    Row(
        "one-island",
        "loss 3.482 to 3.485, 35M (2503.09799)",
        (unclaimed("one island", "one worker"),),
    ),
    Row("ray", "the same engine: the same bits", (shown(Claim("DiLoCo on Ray", "DiLoCo", 0, 0)),)),
)

MORE = (
    Row(
        "more-k",
        "more islands are better, with less and less gain (2311.08105)",
        (
            shown(better("k = 2", "one worker")),
            shown(better("DiLoCo", "k = 2")),
            shown(better("k = 16", "k = 8")),
        ),
    ),
    Row("small-H", "more often is better (2311.08105)", (unclaimed("H = 5", "DiLoCo"),)),
    Row(
        "schedule",
        "total compute counts, not when (2311.08105)",
        (
            shown(Claim("k = 8, doubling", "k = 8, halving", -2, 2)),
            shown(Claim("k = 8, ramp up", "k = 8, ramp down", -2, 2)),
            shown(worse("k = 8, ramp down", "k = 8")),
        ),
    ),
    Row(
        "pruning",
        "sign pruning 75 %: perplexity 15.27 to 15.02 (2311.08105); feedback pays (SparseLoCo)",
        (
            shown(Claim("top-k", "DiLoCo", at_most=3)),
            shown(better("top-k, feedback", "top-k")),
            shown(better("ternary, feedback", "ternary")),
        ),
    ),
    Row(
        "async",
        "perplexity: DN and DyLU 41.13, naive 44.27, DiLoCo 41.35, 20M (2401.09135)",
        (
            shown(better("async, uneven speeds", "async, plain Nesterov, uneven speeds")),
            unclaimed("async, uneven speeds", "uneven speeds"),
        ),
    ),
    Row(
        "decoupled",
        "the same quality without waiting (2604.21428)",
        (shown(Claim("decoupled, uneven speeds", "uneven speeds", at_most=2)),),
    ),
    Row(
        "streaming-e3m0",
        "loss 3.53 to 3.54, 35M (2501.18512)",
        (shown(Claim("4 fragments, tau 5, e3m0", "DiLoCo", at_most=2)),),
    ),
    Row(
        "radial",
        "points of text average: +1.3, M = 8 (2604.21428)",
        (unclaimed("radial", "DiLoCo"), shown(Claim("radial 0.35", "DiLoCo", at_most=TIE))),
    ),
    Row(
        "muon",
        "MuLoCo: outer 0.7 / 0.6, H = 30",
        (shown(better("Muon", "Muon, one worker")), unclaimed("Muon", "DiLoCo")),
    ),
    Row("one-island-rates", "3.482 to 3.485, 35M (2503.09799)", (unclaimed("one island 0.5 / 0.5", "one worker"),)),
    Row(
        "scratch",
        "a warm start is not needed (2311.08105)",
        (unclaimed("DiLoCo from scratch", "one worker from scratch"),),
    ),
)


def chosen(claims: str, only: Iterable[str] = ()) -> tuple[Row, ...]:
    """claims: core or all; only: names of rows, none for every one of them."""
    rows, only = CORE if claims == "core" else (*CORE, *MORE), set(only)
    return tuple(row for row in rows if not only or row.name in only)
