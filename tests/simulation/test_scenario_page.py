"""What docs/reliability.md says of scenario files against the code: kinds, fields, defaults, presets."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from diloco_ray.config import RunConfig
from diloco_ray.presets import PRESETS
from diloco_ray.simulation.network import NetworkSettings
from diloco_ray.simulation.scenario import (
    BASE,
    OTHERS,
    OWN_FIELDS,
    BadPayload,
    Chance,
    Fault,
    Kind,
    Named,
    Scenario,
    merged,
    scenarios,
)

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
SECTION = PAGE.split("\n## The fault matrix")[1].split("\n## ")[0]
OF_EACH_PRESET = [named for named in scenarios("all") if "each preset" in named.scenario.about]


def table(head: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column is called so."""
    lines = SECTION.split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def in_ticks(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def as_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_file_that_is_shown_can_be_meant(tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(SECTION.split("```yaml\n")[1].split("```")[0])
    [named] = scenarios(str(path))
    assert len(named.scenario.faults) == 5


def test_every_kind_of_fault_is_there_with_whom_it_may_strike_and_what_it_has() -> None:
    rows = table("kind")
    assert [kind for [kind] in (in_ticks(row[0]) for row in rows)] == list(get_args(Kind))
    for kind, (_, what, who, fields) in zip(get_args(Kind), rows):
        others = OTHERS.get(kind, ())
        assert what
        assert ("an island" in who, in_ticks(who)) == (others != ("storage",), list(others)), kind
        assert in_ticks(fields) == list(OWN_FIELDS.get(kind, ())), kind


def test_every_bad_payload_is_there() -> None:
    named = [name for how, what in table("how") for name in in_ticks(how) if what]
    assert sorted(named) == sorted(get_args(BadPayload))


def test_what_a_fault_has_where_it_is_not_given() -> None:
    told = re.search(r"^`for_s` is (\S+) and `factor` (\S+) where .+, `how` is `(\w+)`", SECTION, re.MULTILINE)
    assert told
    defaults = [Fault.model_fields[name].default for name in ("for_s", "factor", "how")]
    assert [float(told[1]), float(told[2]), told[3]] == defaults


def test_every_field_of_a_file_is_there_with_its_default() -> None:
    fields = {**Scenario.model_fields}
    for section, model in (("network", NetworkSettings), ("chance", Chance)):
        del fields[section]
        fields |= {f"{section}.{name}": field for name, field in model.model_fields.items()}
    told = {name: default for row in table("field") for name, default in [(in_ticks(row[0])[0], row[1])]}
    assert set(told) == set(fields)
    in_numbers = {name: yaml.safe_load(in_ticks(cell)[0]) for name, cell in told.items() if in_ticks(cell)}
    assert in_numbers == {name: as_in_yaml(fields[name].default) for name in in_numbers}
    assert set(told) - set(in_numbers) == {"about", "recipe", "variants", "faults", "chance.kinds"}


@pytest.mark.parametrize("named", OF_EACH_PRESET, ids=lambda named: named.name)
def test_what_speaks_of_each_preset_has_each(named: Named) -> None:
    recipes = [merged(merged(BASE, named.scenario.recipe), variant) for variant in named.scenario.variants]
    configs = [RunConfig.from_dict({"name": "story", **recipe}) for recipe in recipes]
    assert {config.sync.preset for config in configs} == set(PRESETS)
    assert {config.inner.steps_per_round for config in configs if config.sync.preset == "data_parallel"} == {1}


def test_the_page_speaks_of_each_preset_where_the_scenario_does() -> None:
    told = {in_ticks(row[0])[0] for row in table("scenario") if "each preset" in row[1]}
    assert told == {named.name for named in OF_EACH_PRESET} == {"anything", "calm"}
