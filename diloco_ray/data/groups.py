"""Which group each training document belongs to. An island trains on the text of one group only (non-iid), or on all.

    iid        one group
    label      one for each value of the label column, in the order of the values as text
    cluster    k-means of byte bigrams, numbered from the one with most text to the one with least

DiLoCo's non-iid experiment clusters the features of a language model (arXiv 2311.08105). Ours are much plainer: how
often each pair of neighbouring bytes occurs. They tell languages, scripts and kinds of text apart, not topics. A
document counts by its length: short ones, which have few pairs, would be a kind of their own. This module does not
know about tokens, nor which island gets which group.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diloco_ray.data.corpus import Corpus
from diloco_ray.data.settings import DataSettings
from diloco_ray.errors import DataError

CENTRES = "centres.bin"
NUM_FEATURES = 1024
FEATURE_BYTES = 64 * 1024  # of each document are looked at
SAMPLE = 10_000  # documents that centres are found from
STARTS, LLOYD_ROUNDS = 4, 20
_HASH = 0x9E3779B1  # bigram -> feature: Fibonacci hashing

Place = Callable[[bytes], int]  # where a document falls among 0 .. 2**64 - 1, by its content alone


@dataclass(frozen=True)
class Groups:
    """`of(documents, labels)`: each one's number, 0 .. len(names) - 1. `files` go beside the token shards."""

    names: tuple[str, ...]
    of: Callable[[Sequence[bytes], Sequence[str]], list[int]]
    files: Mapping[str, bytes]


def find_groups(settings: DataSettings, corpus: Corpus, place: Place, limit: int) -> Groups:
    """Reads the corpus once more unless iid. Training documents are those whose place is `limit` or more."""
    match settings.shards:
        case "iid":
            return groups_again(settings, ["all"], {})
        case "label":
            assert corpus.labels is not None
            pairs = zip(corpus.documents(), corpus.labels())
            names = {label for document, label in pairs if document and place(document) >= limit}
            return groups_again(settings, sorted(names), {})
        case "cluster":
            assert settings.clusters is not None
            centres = k_means(*_sample(corpus.documents(), place, limit), settings.clusters)
            names = [f"cluster-{number}" for number in range(len(centres))]
            return groups_again(settings, names, {CENTRES: centres.astype("<f4").tobytes()})


def groups_again(settings: DataSettings, names: Iterable[str], files: Mapping[str, bytes]) -> Groups:
    """From what was found before."""
    names = tuple(names)
    if settings.shards == "iid":
        return Groups(names, lambda documents, labels: [0] * len(documents), files)
    if settings.shards == "cluster":
        centres = np.frombuffer(files[CENTRES], "<f4").reshape(len(names), NUM_FEATURES)
        return Groups(names, lambda documents, labels: nearest(features(documents), centres).tolist(), files)
    numbers = {name: number for number, name in enumerate(names)}

    def by_label(documents: Sequence[bytes], labels: Sequence[str]) -> list[int]:
        try:
            return [numbers[label] for label in labels]
        except KeyError as error:
            what = f"label {error} was not there when the corpus was read first: it has changed meanwhile"
            raise DataError(what, where="data.corpus", remedy="prepare again in a new folder") from None

    return Groups(names, by_label, files)


def features(documents: Sequence[bytes]) -> np.ndarray:
    """(n, NUM_FEATURES) float32 rows of length 1: square roots of the shares of hashed byte pairs (Hellinger's map)."""
    rows = np.zeros((len(documents), NUM_FEATURES), np.float32)
    for row, document in zip(rows, documents):
        values = np.frombuffer(document[:FEATURE_BYTES], np.uint8).astype(np.uint32)
        pairs = (values[:-1] << np.uint32(8)) | values[1:] if len(values) > 1 else values
        hashed = (pairs * np.uint32(_HASH)) >> np.uint32(32 - (NUM_FEATURES - 1).bit_length())
        row += np.sqrt(np.bincount(hashed, minlength=NUM_FEATURES) / max(1, len(pairs)))
    return rows


def k_means(rows: np.ndarray, weights: np.ndarray, num_clusters: int, seed: int = 0) -> np.ndarray:
    """(num_clusters, NUM_FEATURES) float32 centres of rows (n, NUM_FEATURES) with weights (n,), the heaviest first.

    The best of STARTS runs of k-means++ (Arthur and Vassilvitskii, 2007) and Lloyd's rounds until nothing moves, at
    most LLOYD_ROUNDS. A function of its arguments on one machine; another one's sums may differ in their last bits.
    DataError where fewer than num_clusters rows differ.
    """
    rng = np.random.default_rng(seed)
    runs = [_lloyd(rows, weights, _first_centres(rows, weights, num_clusters, rng)) for _ in range(STARTS)]
    centres = min(runs, key=lambda centres: float(weights @ _distances(rows, centres).min(axis=1)))
    heaviness = np.bincount(nearest(rows, centres), weights, num_clusters)
    return centres[np.argsort(-heaviness, kind="stable")]


def _first_centres(rows: np.ndarray, weights: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    centres = rows[:0]
    while len(centres) < num_clusters:
        apart = _distances(rows, centres).min(axis=1) if len(centres) else np.ones(len(rows))
        if not (apart > 1e-6).any():  # that much is rounding
            what = f"no {num_clusters} groups can be made: only {len(centres)} training documents differ"
            raise DataError(what, where="data.clusters", remedy="choose fewer data.clusters, or give more text")
        chances = weights * apart
        centres = np.concatenate([centres, rows[[rng.choice(len(rows), p=chances / chances.sum())]]])
    return centres


def _lloyd(rows: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> np.ndarray:
    own = nearest(rows, centres)
    for _ in range(LLOYD_ROUNDS):
        shares = [np.where(own == number, weights, 0.0).astype(np.float32) for number in range(len(centres))]
        means = [share @ rows / share.sum() if share.any() else centre for share, centre in zip(shares, centres)]
        centres, before = np.stack(means), own
        own = nearest(rows, centres)
        if (own == before).all():
            break
    return centres


def nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) number of the centre that each row is nearest to."""
    return _distances(rows, centres).argmin(axis=1)


def _distances(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, k) squared, of rows of length 1."""
    return np.maximum(0.0, 1.0 - 2.0 * (rows @ centres.T).astype(np.float64) + (centres.astype(np.float64) ** 2).sum(1))


def _sample(documents: Iterable[bytes], place: Place, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and lengths of the SAMPLE training documents with the lowest places: spread over the whole corpus."""
    lowest: list[tuple[int, int, np.ndarray, int]] = []  # numbers differ, so that rows are never compared
    for number, document in enumerate(documents):
        at = place(document)
        if not document or at < limit:
            continue
        if len(lowest) < SAMPLE:
            heapq.heappush(lowest, (-at, -number, features([document]), len(document)))
        elif -at > lowest[0][0]:
            heapq.heapreplace(lowest, (-at, -number, features([document]), len(document)))
    lowest.sort(reverse=True)
    rows = np.concatenate([features([]), *(row for _, _, row, _ in lowest)])
    return rows, np.array([length for *_, length in lowest], np.float64)
