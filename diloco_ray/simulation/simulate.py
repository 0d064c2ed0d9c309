"""Many stories of many scenarios: told by several processes, and where one fails, cut down to what it takes."""

import gc
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from diloco_ray.errors import ConfigError
from diloco_ray.simulation.beginning import Beginning, prepared_data
from diloco_ray.simulation.scenario import Named, Scenario
from diloco_ray.simulation.world import Story, World

AT_ONCE = 10  # stories of one scenario that a process tells before it says how they went
LAST_LINES = 25  # of a trace that is shown


@dataclass
class Tally:
    """How the stories of one scenario went."""

    stories: int = 0
    faults: int = 0
    outer_steps: int = 0
    contributions: int = 0
    virtual_s: float = 0.0
    messages: int = 0
    failed: list[Story] = field(default_factory=list[Story])

    def add(self, story: Story) -> None:
        self.stories += 1
        self.faults += story.num_struck
        self.outer_steps += story.outer_steps
        self.contributions += story.contributions
        self.virtual_s += story.virtual_s
        self.messages += story.messages
        self.failed += [story] if story.problem else []

    def to_dict(self) -> dict[str, Any]:
        failed = [{"seed": story.seed, "problem": story.problem} for story in self.failed]
        return {**vars(self), "virtual_s": round(self.virtual_s), "failed": failed}


def simulate(
    named: Sequence[Named], seeds: Sequence[int], workers: int, say: Callable[[str], None]
) -> tuple[dict[str, Tally], float]:
    """The seeds, dealt out over the scenarios; tallies by scenario, and the seconds that it took."""
    began_s = time.monotonic()
    tallies = {one.name: Tally() for one in named}
    with tempfile.TemporaryDirectory(prefix="dr-sim-") as folder:
        prepared_data(Path(folder))
        tasks = [
            (one, seeds[at : at + AT_ONCE * len(named) : len(named)])
            for number, one in enumerate(named)
            for at in range(number, len(seeds), AT_ONCE * len(named))
        ]
        for one, stories in _told(tasks, folder, workers):
            for story in stories:
                tallies[one].add(story)
                if story.problem:
                    say(f"{one}, seed {story.seed}: {story.problem}")
    return tallies, time.monotonic() - began_s


def _told(tasks: list[tuple[Named, Sequence[int]]], folder: str, workers: int) -> Iterator[tuple[str, list[Story]]]:
    if workers == 1:
        teller = Teller(Path(folder))
        for named, seeds in tasks:
            yield named.name, [teller.tell(named, seed) for seed in seeds]
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (folder,)) as pool:
        for task, stories in zip(tasks, pool.map(_tell, tasks)):
            yield task[0].name, stories


class Teller:
    """Keeps the beginnings of the stories that it tells. folder: of `prepared_data`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._beginnings: dict[str, Beginning] = {}
        torch.set_num_threads(1)

    def tell(self, named: Named, seed: int, which: Sequence[int] | None = None) -> Story:
        return World(named.scenario, self._beginning(named.scenario, seed), seed, which).play()

    def _beginning(self, scenario: Scenario, seed: int) -> Beginning:
        recipe = scenario.recipe_of(seed)
        if (key := repr(recipe)) not in self._beginnings:
            self._beginnings[key] = Beginning(recipe, self._folder)
        return self._beginnings[key]

    def shortest(self, named: Named, story: Story) -> tuple[Story, list[int]]:
        """The same seed with as few faults as still break something, and their numbers."""
        which = list(range(len(story.faults)))
        for number in range(len(story.faults)):
            fewer = [other for other in which if other != number]
            told = self.tell(named, story.seed, fewer)
            if told.problem:
                story, which = told, fewer
        return story, which


_teller: Teller | None = None


def _begin(folder: str) -> None:
    global _teller
    os.nice(5)
    _teller = Teller(Path(folder))
    gc.freeze()  # what is imported by now is not looked through again


def _tell(task: tuple[Named, Sequence[int]]) -> list[Story]:
    assert _teller is not None
    return [_teller.tell(task[0], seed) for seed in task[1]]


def as_json(story: Story) -> dict[str, Any]:
    """A story as `Tally.to_dict` tells of many; its trace by the digest alone."""
    return {
        "faults": [str(fault) for fault in story.faults],
        "struck": story.num_struck,
        "outer_steps": story.outer_steps,
        "contributions": story.contributions,
        "virtual_s": round(story.virtual_s),
        "messages": story.messages,
        "problem": story.problem,
        "trace_sha256": story.trace_sha256,
    }


def fault_numbers(text: str | None, seed: int | None) -> list[int] | None:
    """Those of `--faults`, such as 0,2, or none; None where it is not given. ConfigError where it cannot be meant."""
    if text is None:
        return None
    if seed is None:
        what = f"--faults {text} without --seed: each story has faults of its own"
        raise ConfigError(what, where="--faults", remedy="name the story too, as in --seed 42 --faults 0,2")
    if not re.fullmatch(r"none|\d+(,\d+)*", text):
        raise ConfigError(f"{text!r} is no list of numbers", where="--faults", remedy="give such as 0,2, or none")
    return [int(number) for number in re.findall(r"\d+", text)]


def one_story(named: Named, seed: int, which: Sequence[int] | None, say: Callable[[str], None]) -> Story:
    """Tells a story with its whole trace."""
    with tempfile.TemporaryDirectory(prefix="dr-sim-") as folder:
        prepared_data(Path(folder))
        story = Teller(Path(folder)).tell(named, seed, which)
    for line in story.trace:
        say(line)
    say(f"trace {story.trace_sha256}")
    say(story.problem or "every invariant held")
    return story


def explain(named: Sequence[Named], tallies: dict[str, Tally], say: Callable[[str], None]) -> None:
    """The first failure, with no more faults than it takes, its last moments, and the command that repeats it."""
    for one in named:
        for story in tallies[one.name].failed[:1]:
            with tempfile.TemporaryDirectory(prefix="dr-sim-") as folder:
                prepared_data(Path(folder))
                shortest, which = Teller(Path(folder)).shortest(one, story)
            say(f"\n{one.name}, seed {story.seed}: {shortest.problem}")
            for number, fault in enumerate(story.faults):
                say(f"  fault {number}: {fault}{'' if number in which else '   (not needed)'}")
            for line in shortest.trace[-LAST_LINES:]:
                say(f"  {line}")
            faults = ",".join(map(str, which)) or "none"
            again = shlex.quote(one.given or one.name)
            say(f"again: diloco-ray simulate {again} --seed {story.seed} --faults {faults}")
            return


def table(tallies: dict[str, Tally]) -> list[str]:
    lines = [f"{'scenario':20} {'stories':>8} {'faults':>8} {'outer steps':>12} {'messages':>10} {'failed':>7}"]
    for name, tally in tallies.items():
        numbers = f"{tally.stories:>8,} {tally.faults:>8,} {tally.outer_steps:>12,} {tally.messages:>10,}"
        lines.append(f"{name:20} {numbers} {len(tally.failed):>7}")
    return lines
