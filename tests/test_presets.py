"""Presets: one word for a few fields, in their layer, and plain numbers in the end."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.config import RunConfig, default_of, differences, layered
from diloco_ray.coordination.settings import Preset, SyncSettings
from diloco_ray.errors import ConfigError
from diloco_ray.presets import ONE_ROUND, PRESETS, SAME_STEPS, flatten

RECIPES = sorted((Path(__file__).parents[1] / "jobs").glob("*.yaml"))
MODEL = {"factory": "tests.model.plain_module:build"}


def resolved(body: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Every field of the run by its path."""
    return flatten(RunConfig.from_dict({"model": MODEL, **body}, overrides).model_dump(mode="json"))


def changed(body: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """The fields that differ from those of the recipe by itself."""
    before, after = resolved(body), resolved(body, *overrides)
    return {path: value for path, value in after.items() if before.get(path) != value}


def test_the_names_are_those_that_a_recipe_may_give() -> None:
    assert set(PRESETS) == set(get_args(Preset))
    assert all(default_of(path) is not ... for fields in PRESETS.values() for path in fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_fields_and_nothing_else(preset: str) -> None:
    fields = PRESETS[preset]
    found = resolved({}, f"sync.preset={preset}")
    assert {path: found[path] for path, value in fields.items() if value not in (ONE_ROUND, SAME_STEPS)}.items() <= (
        fields.items()
    )
    assert set(changed({}, f"sync.preset={preset}")) <= {*fields, "sync.preset"}
    assert found == resolved({"sync": {"preset": preset}})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_one_word_changes_the_algorithm_of_any_recipe_and_a_dump_means_itself(recipe: Path, preset: str) -> None:
    config = RunConfig.from_yaml(recipe, [f"sync.preset={preset}"])
    dump = config.model_dump(mode="json")
    assert RunConfig.from_dict(dump) == config
    assert RunConfig.model_validate(dump) == config
    assert config.num_inner_steps == RunConfig.from_yaml(recipe).num_inner_steps


LAYERS = [
    ("a default", {}, (), 0.7, "default"),
    ("the preset in the recipe is over a default", {"sync": {"preset": "streaming"}}, (), 0.4, "preset"),
    (
        "a field of the recipe is over its preset",
        {"sync": {"preset": "streaming"}, "outer": {"learning_rate": 0.5}},
        (),
        0.5,
        "recipe",
    ),
    (
        "a preset given by --set is over a field of the recipe",
        {"outer": {"learning_rate": 0.5}},
        ("sync.preset=streaming",),
        0.4,
        "preset",
    ),
    (
        "another --set is over it, whichever comes first",
        {"outer": {"learning_rate": 0.5}},
        ("outer.learning_rate=0.6", "sync.preset=streaming"),
        0.6,
        "--set",
    ),
    (
        "a preset given by --set takes the place of the recipe's",
        {"sync": {"preset": "streaming"}},
        ("sync.preset=diloco",),
        0.7,
        "default",
    ),
    ("the last preset counts", {}, ("sync.preset=streaming", "sync.preset=fedavg"), 1.0, "preset"),
    ("a whole section may name it", {}, ("sync={preset: streaming, mixing: 0.1}",), 0.4, "preset"),
]


@pytest.mark.parametrize(
    ("body", "overrides", "rate", "source"), [row[1:] for row in LAYERS], ids=[r[0] for r in LAYERS]
)
def test_the_nearer_layer_counts(body: dict[str, Any], overrides: tuple[str, ...], rate: float, source: str) -> None:
    assert resolved(body, *overrides)["outer.learning_rate"] == rate
    assert layered(body, overrides).sources.get("outer.learning_rate", "default") == source


def test_a_whole_section_takes_the_place_of_the_recipes() -> None:
    body = {"sync": {"preset": "eager", "uplink": "int4"}}
    assert resolved(body, "sync={downlink: float32}") == resolved({}, "sync.downlink=float32")


@pytest.mark.parametrize("preset", ["delayed", "eager"])
def test_an_overlap_of_a_round_follows_the_rounds_final_length(preset: str) -> None:
    overrides = [f"sync.preset={preset}", "inner.steps_per_round=30"]
    assert resolved({"inner": {"steps_per_round": 25}}, *overrides)["sync.overlap"] == 30
    assert resolved({"inner": {"steps_per_round": 25}, "sync": {"preset": preset}})["sync.overlap"] == 25
    assert resolved({"sync": {"preset": "delayed"}}, "sync.overlap=3")["sync.overlap"] == 3


def test_data_parallel_takes_the_same_inner_steps_and_looks_as_seldom() -> None:
    body = {"rounds": 16, "inner": {"steps_per_round": 25}, "evaluation": {"every_rounds": 2}}
    assert changed(body, "sync.preset=data_parallel") == {
        "sync.preset": "data_parallel",
        "rounds": 400,
        "inner.steps_per_round": 1,
        "inner.checkpoint_every_rounds": 25,
        "evaluation.every_rounds": 50,
        "storage.snapshot_every_rounds": 250,
        "outer.optimizer": "sgd",
        "outer.learning_rate": 1.0,
        "sync.uplink": "float32",
        "sync.downlink": "float32",
    }
    assert resolved(body, "sync.preset=data_parallel", "rounds=8")["rounds"] == 8
    longer = resolved(body, "sync.preset=data_parallel", "inner.steps_per_round=5")
    assert (longer["inner.steps_per_round"], longer["rounds"]) == (5, 16)


def test_sections_that_are_settings_already_resolve_too() -> None:
    config = RunConfig(model=MODEL, sync=SyncSettings(preset="streaming", mixing=0.1))  # type: ignore[call-arg, arg-type]
    assert (config.sync.fragments, config.sync.mixing, config.outer.learning_rate) == (4, 0.1, 0.4)


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    for overrides in (["sync.preset=streamin"], []):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_dict({"model": MODEL, "sync": {"preset": "streamin"}}, overrides)
        assert "unknown preset 'streamin'" in str(caught.value)
        assert "did you mean streaming?" in caught.value.remedy
    with pytest.raises(ConfigError, match="unknown preset None"):
        RunConfig.from_dict({"model": MODEL, "sync": {"preset": None}})


def test_the_same_fields_are_the_same_run_whatever_the_word() -> None:
    one = RunConfig.from_dict({"model": MODEL, "sync": {"preset": "fedavg"}})
    other = RunConfig.from_dict({"model": MODEL, "outer": {"optimizer": "sgd", "learning_rate": 1}})
    assert differences(one.identity(), other.identity()) == []


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    in_recipe=st.booleans(),
    rate=st.none() | st.floats(0.1, 1.0),
    steps=st.none() | st.integers(5, 200),
)
def test_resolving_twice_changes_nothing(preset: str, in_recipe: bool, rate: float | None, steps: int | None) -> None:
    body: dict[str, Any] = {"model": MODEL, "inner": {} if steps is None else {"steps_per_round": steps}}
    body |= {"sync": {"preset": preset}} if in_recipe else {}
    overrides = [] if in_recipe else [f"sync.preset={preset}"]
    overrides += [] if rate is None else [f"outer.learning_rate={rate}"]
    once = layered(body, overrides).body
    assert layered(once).body == once
