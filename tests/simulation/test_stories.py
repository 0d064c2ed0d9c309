"""Stories are repeatable, cut down to what they take, and told by a command with an exit status."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diloco_ray.cli import main
from diloco_ray.errors import ConfigError
from diloco_ray.simulation.beginning import prepared_data
from diloco_ray.simulation.scenario import Chance, Fault, Named, Scenario, scenarios
from diloco_ray.simulation.simulate import Teller, simulate
from tests.simulation.test_planted_bugs import drop_a_lease

COMMAND = (sys.executable, "-m", "diloco_ray.cli", "simulate")
ONE_KILL = "faults: [{kill: island-00, at_s: 4}]\nnetwork: {loss: 0}\n"


def simulated(patch: pytest.MonkeyPatch, *words: str) -> int:
    """The command's exit code, told in this process; `main` prints what it prints."""
    patch.setattr(sys, "argv", ["diloco-ray", "simulate", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Teller:
    folder = tmp_path_factory.mktemp("stories")
    prepared_data(folder)
    return Teller(folder)


@pytest.mark.parametrize("named", scenarios("all"), ids=lambda named: named.name)
def test_every_invariant_holds_in_each_scenario(teller: Teller, named: Named) -> None:
    for seed in range(70_000, 70_003):
        assert teller.tell(named, seed).problem == "", f"diloco-ray simulate {named.name} --seed {seed}"


def test_equal_seeds_give_equal_traces_in_any_process(teller: Teller) -> None:
    [named] = scenarios("anything")
    stories = [teller.tell(named, seed) for seed in (3, 3, 4)]
    assert stories[0].trace == stories[1].trace != stories[2].trace
    told = subprocess.run([*COMMAND, "anything", "--seed", "3"], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-2:] == [f"trace {stories[0].trace_sha256}", "every invariant held"]


def test_faults_strike_and_the_run_gets_over_them(teller: Teller) -> None:
    body = {
        "faults": [
            {"kill": "island-01", "at_s": 2.5},
            {"kill": "coordinator", "point": "after create log/*", "skip": 1},
            {"freeze": "island-00", "after_round": 3, "for_s": 30},
        ]
    }
    story = teller.tell(Named("three", Scenario.model_validate(body)), 1)
    assert (story.problem, story.num_struck) == ("", 3)
    trace = "\n".join(story.trace)
    assert "kill island-01" in trace
    assert "the coordinator's process ended: killed" in trace
    assert "island-00 lost: silent for" in trace
    assert "coordinator: round 5" in trace


@pytest.mark.parametrize(
    ("name", "deaths"), [("together", 2 + 2 + 3 + 4), ("last_ones", 4), ("stand_still", 0), ("crash_loop", 20)]
)
def test_what_a_script_says_comes_to_pass(teller: Teller, name: str, deaths: int) -> None:
    [named] = scenarios(name)
    story = teller.tell(Named(name, named.scenario.model_copy(update={"chance": Chance()})), 5)
    trace = "\n".join(story.trace)
    assert (story.problem, story.num_struck) == ("", len(named.scenario.faults))
    assert "nobody there" not in trace
    assert trace.count("ended: killed") + trace.count("ended: preempted") >= deaths


@pytest.mark.parametrize("uplink", ["float32", "int8"])
def test_a_huge_contribution_is_refused_for_its_norm(teller: Teller, uplink: str) -> None:
    """Which is a number: what is infinite would be refused before its norm is compared with others."""
    faults = [{"bad_payload": "island-01", "after_round": 2, "how": "huge"}]
    body = {"recipe": {"sync": {"uplink": uplink}}, "faults": faults, "network": {"loss": 0}}
    story = teller.tell(Named("huge", Scenario.model_validate(body)), 0)
    [refused] = [line for line in story.trace if "rejected" in line]
    assert story.problem == ""
    reason = r"island-01: contribution rejected \(strike 1\): norm: \d+(\.\d)? is more than 100 x the running"
    assert re.search(reason, refused)


def test_a_huge_contribution_is_refused_before_any_other_has_come(teller: Teller) -> None:
    """What its inner steps can do is known from the recipe."""
    faults: list[dict[str, Any]] = [{"bad_payload": "island-01", "at_s": 0.1, "how": "huge"}]
    faults += [{"freeze": name, "at_s": 0.2, "for_s": 20} for name in ("island-00", "island-02")]
    body = {"recipe": {"rounds": 2}, "faults": faults, "network": {"loss": 0}}
    story = teller.tell(Named("huge", Scenario.model_validate(body)), 0)
    [refused] = [line for line in story.trace if "rejected" in line]
    assert story.problem == ""
    assert re.search(r"strike 1\): norm: \d+(\.\d)? is more than \d.*, which \d+ inner steps do not exceed", refused)


def test_nobody_is_given_up_for_what_takes_long_on_the_line(teller: Teller) -> None:
    """The model, 16 s where 12 s of silence are borne, and contributions that take longer than a first attempt."""
    [named] = scenarios("slow_line")
    network = named.scenario.network.model_copy(update={"loss": 0.0, "late": 0.0})
    for seed in range(4):
        story = teller.tell(Named("slow", named.scenario.model_copy(update={"network": network})), seed)
        assert (story.problem, [line for line in story.trace if "silent" in line]) == ("", [])


def test_an_answer_that_is_lost_costs_no_island_its_work(teller: Teller) -> None:
    """For a second nothing reaches the islands, and silence is borne no longer than an attempt at a call may take."""
    body = {
        "recipe": {"sync": {"heartbeat_timeout_s": 6.0}},
        "network": {"loss": 0.0, "late": 0.0},
        "faults": [{"deafen": f"island-0{number}", "at_s": 4.0 + number, "for_s": 2.5} for number in range(3)],
    }
    for seed in range(4):
        story = teller.tell(Named("deaf", Scenario.model_validate(body)), seed)
        assert (story.problem, [line for line in story.trace if "silent" in line]) == ("", [])


def test_a_coordinator_whose_storage_is_slow_loses_and_forgets_no_island(teller: Teller) -> None:
    body = {
        "variants": [{}, {"sync": {"preset": "decoupled", "fragments": 3}}],
        "network": {"loss": 0.0, "late": 0.0, "doubled": 0.0},
        "faults": [{"sluggish": "storage", "at_s": 2, "for_s": 100}],
    }
    for seed in range(6):
        story = teller.tell(Named("slow", Scenario.model_validate(body)), seed)
        words = [line for line in story.trace if " joined" in line or "ended:" in line or "rejected (strike" in line]
        assert (story.problem, len(words)) == ("", len({line.split()[2] for line in words})), story.trace


def test_fifty_islands_join_within_a_second(teller: Teller) -> None:
    steady = {"loss": 0.0, "late": 0.0, "delay_s": [0.01, 0.4]}
    crowd = {"recipe": {"islands": [2, 50], "rounds": 1}, "network": steady}
    story = teller.tell(Named("crowd", Scenario.model_validate(crowd)), 0)
    joined = [line.split() for line in story.trace if " joined (incarnation 1" in line]
    in_time = {name for when_s, _, name, *_ in joined if float(when_s) < 1.0}
    assert (story.problem, len(in_time)) == ("", 50)


def test_a_failing_story_is_cut_down_to_the_faults_that_it_takes(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_a_lease(monkeypatch)
    faults = [
        {"slow": "island-02", "at_s": 1},
        {"kill": "island-00", "at_s": 4},
        {"sluggish": "storage", "at_s": 6, "for_s": 1},
    ]
    named = Named("three", Scenario.model_validate({"faults": faults, "network": {"loss": 0}}))
    story = teller.tell(named, 0)
    assert story.problem.startswith("I9")
    shortest, which = teller.shortest(named, story)
    assert which == [1]
    assert shortest.problem == teller.tell(named, 0, [1]).problem


def test_failures_are_counted_and_end_the_command_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    tallies, _ = simulate(scenarios("calm"), range(3), 1, told.append)
    assert (tallies["calm"].stories, tallies["calm"].failed, told) == (3, [], [])
    drop_a_lease(monkeypatch)
    faults = [{"kill": "island-00", "at_s": 4}]
    named = Named("one", Scenario.model_validate({"faults": faults, "network": {"loss": 0}}))
    tallies, _ = simulate([named], range(2), 1, told.append)
    assert len(tallies["one"].failed) == len(told) == 2


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    scenario = tmp_path / "mine.yaml"
    scenario.write_text("recipe: {rounds: 2}\nfaults: [{kill: everything, at_s: 3}]\n")
    to = tmp_path / "runs" / "of today" / "found.json"
    command = [*COMMAND, str(scenario), "--seeds", "4", "--workers", "2", "--json", str(to)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    found = json.loads(to.read_text())
    assert (found["ok"], found["stories"], found["scenarios"]["mine"]["faults"]) == (True, 4, 4)


def test_the_command_that_is_printed_tells_the_same_story_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a user's own file, whose path a shell would take apart; and what one story's file says of it."""
    drop_a_lease(monkeypatch)
    folder = tmp_path / "my own"
    folder.mkdir()
    (folder / "one kill.yaml").write_text(ONE_KILL)
    monkeypatch.chdir(tmp_path)
    assert simulated(monkeypatch, "my own/one kill.yaml", "--seeds", "1", "--workers", "1") == 1
    printed = capsys.readouterr().out
    [problem] = re.findall(r"^one kill, seed 0: (I9.+)$", printed.split("1 failed\n")[1], re.MULTILINE)
    [again] = re.findall(r"^again: diloco-ray simulate (.+)$", printed, re.MULTILINE)
    assert simulated(monkeypatch, *shlex.split(again), "--json", "told/story.json") == 1
    *trace, sha256, told = capsys.readouterr().out.splitlines()
    assert told == problem
    found = json.loads((tmp_path / "told" / "story.json").read_text())
    story = found["scenarios"]["one kill"]
    assert (found["ok"], found["seed"], story["problem"]) == (False, 0, problem)
    assert sha256 == f"trace {story['trace_sha256']}"
    assert (story["faults"], story["struck"]) == (["kill island-00 at 4.00 s"], 1)
    assert any(line.endswith("fault: kill island-00 at 4.00 s") for line in trace)


@pytest.mark.parametrize("options", [["--seeds", "1", "--workers", "1"], ["--seed", "0"]], ids=" ".join)
@pytest.mark.parametrize("to", ["a file/found.json", "a folder"])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_played(
    options: list[str], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    assert simulated(monkeypatch, "calm", *options, "--json", str(tmp_path / to)) == ConfigError.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {tmp_path / to} cannot be written: " in printed.err
    assert "where: --json" in printed.err


@pytest.mark.parametrize("many", [["--seeds", "100"], ["--first-seed", "0"], ["--workers", "1"]], ids=" ".join)
def test_one_story_and_many_are_not_asked_for_together(
    many: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulated(monkeypatch, "calm", "--seed", "3", *many) == ConfigError.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: --seed 3 with {many[0]}: it tells one story" in printed.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("faults: [{explode: island-01, at_s: 3}]", ["faults.0", "kind"]),
        ("faults: [{kill: island-01}]", ["faults.0", "at_s, after_round, point"]),
        ("faults: [{kill: island-01, at_s: 3, after_round: 1}]", ["exactly one"]),
        ("faults: [{kill: coordinator, point: whenever}]", ["faults.0.point"]),
        ("network: {loss: 1.5}", ["network.loss"]),
        ("faults: [{kill: island-09, at_s: 3}]", ["faults.0", "island-09", "island-00, island-01, island-02, coord"]),
        ("recipe: {islands: 2}\nfaults: [{leave: island-02, at_s: 3}]", ["leave of island-02", "island-00, island-01"]),
        ("faults: [{kill: island-02, at_s: 3}]\nvariants: [{}, {islands: 2}]", ["kill of island-02", "island-01"]),
        ("faults: [{cut: coordinator, at_s: 3}]", ["cut of coordinator"]),
        ("faults: [{full: island-00, at_s: 3}]", ["full of island-00", "name one of storage"]),
        ("faults: [{freeze: island-01, at_s: 3, for_s: .inf}]", ["faults.0.for_s", "finite"]),
        ("faults: [{slow: island-01, at_s: 3, factor: .nan}]", ["faults.0.factor", "finite"]),
        ("faults: [{kill: island-01, at_s: 3, for_s: 9}]", ["faults.0", "for_s says nothing of a fault of kind kill"]),
        ("faults: [{cut: island-01, at_s: 3, how: zero}]", ["faults.0", "how says nothing of a fault of kind cut"]),
        ("faults: [{kill: island-01, at_s: 3, skip: 2}]", ["faults.0", "skip says nothing of a fault without a point"]),
        ("faults: [{repeat: storage, at_s: 3}]", ["faults.0", "no create is named", "after create"]),
        ("faults: [{repeat: storage, point: before create log/*}]", ["faults.0", "no create is named"]),
        ("chance: {faults: [4, 1]}", ["chance.faults", "[4, 1]", "the smaller one first"]),
        ("chance: {faults: [-3, -1]}", ["chance.faults", "[-3, -1]", "two numbers from 0 on"]),
        ("chance: {faults: [1]}", ["chance.faults.1", "required"]),
        ("chance: {kinds: []}", ["chance.kinds", "leave it out, or name one at least"]),
        ("chance: {until_s: .inf}", ["chance.until_s", "finite"]),
        ("network: {delay_s: [-1, 2]}", ["network.delay_s", "[-1, 2]", "two numbers from 0 on"]),
        ("network: {delay_s: [2, 1]}", ["network.delay_s", "[2, 1]", "the smaller one first"]),
        ("network: {delay_s: [0.1, .nan]}", ["network.delay_s.1", "finite"]),
        ("network: {bytes_per_s: .inf}", ["network.bytes_per_s", "finite"]),
        ("variants: []", ["variants", "leave it out, or name one at least"]),
        ("recipe: {islands: []}", ["islands", "mine.yaml: recipe"]),
        ("recipe: {islands: {least: 1}}", ["islands", "a whole number such as 4"]),
        ("recipe: {sync: {preset: dilocco}}", ["mine.yaml: recipe sync.preset", "did you mean diloco?"]),
        ("recipe: {data: 3}", ["data: ", "write data as a section"]),
        ("variants: [{}, {rounds: 0}]", ["rounds", "mine.yaml: recipe with variants.1", "at least 1"]),
        ("recipe: {inner: {ranks: 2}}", ["inner.ranks=2", "mine.yaml: recipe", "leave both out"]),
        ("variants: [{cluster: {external_islands: 2}}]", ["cluster.external_islands=2", "variants.0"]),
        ("longest_s: .nan", ["longest_s", "finite"]),
        ("longest_s: .inf", ["longest_s", "finite"]),
        ("longest_s: 1.0e+18", ["longest_s", "less than or equal to 1000000"]),
        ("longest_s: 14", ["longest_s: 14 s, and 10 inner steps take 15 s", "mine.yaml: recipe"]),
        ("variants: [{}, {rounds: 3000}]", ["longest_s: 7200 s, and 6000 inner steps", "variants.1"]),
        ("nonsense: 1", ["nonsense"]),
        ("- nonsense", ["a scenario", "nonsense"]),
        ("a: [", ["not YAML"]),
        ("about: \xff", ["utf-8", "give a YAML file in UTF-8"]),
    ],
)
def test_a_scenario_that_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="latin-1")
    assert simulated(monkeypatch, str(path), "--seeds", "1", "--workers", "1") == ConfigError.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in [*words, f"where: {path}", "what to do: "]), printed.err


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="anything"):
        scenarios("nothing-of-the-kind")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--faults", "0,2"], "--faults 0,2 without --seed"),
        (["--faults", "0;2", "--seed", "3"], "'0;2' is no list of numbers"),
        (["--faults", "0,2,77", "--seed", "3"], "this story has no fault 2, 77: its faults are 0 to 1"),
    ],
)
def test_faults_that_cannot_be_meant_are_refused(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "mine.yaml"
    scenario.write_text("faults: [{kill: island-01, at_s: 3}, {kill: island-02, at_s: 3}]")
    assert simulated(monkeypatch, str(scenario), *options) == ConfigError.exit_code
    assert f"error: {words}" in capsys.readouterr().err


def test_a_fault_says_what_it_is() -> None:
    fault = Fault.model_validate({"freeze": "island-01", "at_s": 2, "for_s": 8})
    assert str(fault) == "freeze island-01 at 2.00 s for 8.0 s"
