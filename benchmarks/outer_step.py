"""How fast the coordinator takes an outer step, and how fast codecs are, against copying as many bytes.

    python -m benchmarks.outer_step --values 25000000 --islands 8 --repeats 5

The floor is one copy_ of (k b + 16) N bytes, through buffers larger than any cache, with as many threads: k islands'
payloads of b bytes a value are read once, parameters and momentum are read and written once. Floor and step alternate,
so that both meet the same neighbours on a shared machine. Prints medians and, in brackets, the lowest and highest.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from diloco_ray.algorithm.codecs import CHUNK_VALUES, CODEC_NAMES, Codec, get_codec
from diloco_ray.algorithm.combine import COMBINES, Combine
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_, inspect_payload
from diloco_ray.algorithm.outer_optimizer import Nesterov
from diloco_ray.algorithm.replica import Replica

FLOOR_BYTES = 2**28  # copied again and again: larger than any cache


def main() -> None:
    arguments = argparse.ArgumentParser(description="Outer step and codecs against copying as many bytes.")
    arguments.add_argument("--values", type=int, default=25_000_000, help="N, parameters of the fragment")
    arguments.add_argument("--islands", type=int, default=8, help="k, contributions to one step")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--codecs", nargs="+", choices=CODEC_NAMES, default=CODEC_NAMES, metavar="CODEC")
    arguments.add_argument("--combine", choices=COMBINES, default="mean")
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    chosen = arguments.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"N = {chosen.values:,}, k = {chosen.islands}, chunks of {CHUNK_VALUES:,}")
    print(f"{chosen.combine}, {chosen.repeats} repeats\n")
    for num_threads in chosen.threads:
        torch.set_num_threads(num_threads)
        print(f"{num_threads} thread(s)")
        for name in chosen.codecs:
            print(_report(get_codec(name), chosen.values, chosen.islands, chosen.repeats, COMBINES[chosen.combine]))


def _report(codec: Codec, num_values: int, num_islands: int, repeats: int, combine: Combine) -> str:
    replica = Replica(partition({"weights": (num_values,)}), Nesterov(), codec)
    base = torch.randn(num_values).mul_(0.02)
    island = torch.randn(num_values).mul_(1e-3).add_(base)
    payloads = [torch.zeros(codec.num_bytes(num_values), dtype=torch.uint8) for _ in range(num_islands)]
    for payload in payloads:
        encode_outer_gradient_(base, island, codec, payload)
    bytes_per_value = codec.num_bytes(num_values) / num_values
    num_floor_bytes = int((num_islands * bytes_per_value + 16) * num_values)
    source, target = torch.ones(2, FLOOR_BYTES, dtype=torch.uint8)
    weights = [1.0 + position for position in range(num_islands)]
    out = torch.empty(num_values)

    def floor() -> None:
        for start in range(0, num_floor_bytes, FLOOR_BYTES):
            stop = min(FLOOR_BYTES, num_floor_bytes - start)
            target[:stop].copy_(source[:stop])

    def encode() -> None:
        for start in range(0, num_values, CHUNK_VALUES):
            codec.encode_(base[start : start + CHUNK_VALUES], payloads[0], start, num_values)

    def decode() -> None:
        for start in range(0, num_values, CHUNK_VALUES):
            codec.decode_(payloads[0], start, num_values, out[start : start + CHUNK_VALUES])

    acts: dict[str, Callable[[], object]] = {
        "floor": floor,
        "step": lambda: replica.outer_step(0, payloads, weights, codec, combine),
        "apply": lambda: replica.apply(0, payloads[0]),
        "encode": encode,
        "decode": decode,
        "gradient": lambda: encode_outer_gradient_(base, island, codec, payloads[0]),
        "inspect": lambda: inspect_payload(payloads[0], num_values, codec),
    }
    times = _alternating(acts, repeats)
    ratios = [step / floor for step, floor in zip(times["step"], times["floor"])]
    rates = {act: [4e-9 * num_values / seconds for seconds in times[act]] for act in list(acts)[2:]}
    return "\n".join(
        (
            f"  {codec.name}: {bytes_per_value:.3f} bytes a value",
            f"    outer step {_spread(times['step'], 1e3)} ms, floor {_spread(times['floor'], 1e3)} ms, "
            f"ratio {_spread(ratios)}",
            f"    GB/s of float32: {', '.join(f'{act} {_spread(rate)}' for act, rate in rates.items())}",
        )
    )


def _alternating(acts: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each act; each repeat runs all of them one after the other, after one that is not counted."""
    times: dict[str, list[float]] = {act: [] for act in acts}
    for repeat in range(repeats + 1):
        for act, perform in acts.items():
            began = time.perf_counter()
            perform()
            if repeat:
                times[act].append(time.perf_counter() - began)
    return times


def _spread(values: list[float], factor: float = 1.0) -> str:
    low, middle, high = (factor * value for value in (min(values), statistics.median(values), max(values)))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


if __name__ == "__main__":
    main()
