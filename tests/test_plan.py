"""The plan: what a recipe comes to, before anything is prepared or started."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from typer.testing import CliRunner

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.cli import app
from diloco_ray.config import RunConfig, layered
from diloco_ray.errors import ConfigError
from diloco_ray.model.build import build_model, parameter_shapes, planned_shapes
from diloco_ray.model.settings import ModelSettings
from diloco_ray.plan import plan_of, plan_parts
from diloco_ray.run import open_run
from tests.processes import run_folder


def planned(body: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return plan_of(RunConfig.from_dict(body, overrides), layered(body, overrides).sources)


def test_every_field_is_there_with_where_it_comes_from(tiny: dict[str, Any]) -> None:
    body = {**tiny, "model": {"config": {**tiny["model"]["config"], "num_hidden_layers": 3}}}
    fields = planned(body, "sync.preset=streaming", "sync.overlap=2")["fields"]
    assert fields["sync.mixing"] == {"value": 0.5, "from": "preset"}
    assert fields["sync.overlap"] == {"value": 2, "from": "--set"}
    assert fields["inner.steps_per_round"] == {"value": 6, "from": "recipe"}
    assert fields["sync.closes"] == {"value": "all", "from": "default"}
    assert fields["model.config.hidden_size"] == {"value": 32, "from": "recipe"}


def test_the_arithmetic_is_that_of_the_run_itself(tiny: dict[str, Any]) -> None:
    fields = ("sync.fragments=3", "sync.partition=balanced", "sync.overlap=2", "sync.uplink=int4")
    plan = planned(tiny, *fields)
    layout = open_run(RunConfig.from_dict(tiny, fields)).layout
    assert plan["parameters"] == layout.num_values
    assert [line["values"] for line in plan["fragments"]] == [fragment.num_values for fragment in layout.fragments]
    assert [(line["sent_at"], line["merged_at"]) for line in plan["fragments"]] == [(2, 4), (4, 6), (6, 8)]
    sizes = [fragment.num_values for fragment in layout.fragments]
    up, down = (sum(get_codec(name).num_bytes(size) for size in sizes) for name in ("int4", "int8"))
    data_parallel = 6 * 2 * 4 * layout.num_values
    assert plan["bytes"] == {
        "up": up,
        "down": down,
        "data_parallel": data_parallel,
        "ratio": data_parallel / (up + down),
    }
    assert (plan["rounds"], plan["inner_steps"], plan["islands"]) == (4, 24, [3, 3])
    assert plan["tokens"] == {"island_round": 6 * 4 * 32, "run": 4 * 3 * 6 * 4 * 32}


def test_where_steps_are_merged_as_they_come_no_inner_step_is_told(tiny: dict[str, Any]) -> None:
    plan = planned(tiny, "sync.preset=decoupled", "sync.fragments=3")
    assert [line["merged_at"] for line in plan["fragments"]] == [None] * 3
    table = next(part for part in plan_parts(plan)[::-1] if isinstance(part, Table))
    assert [*table.columns[4].cells] == ["as it comes"] * 3


def test_where_every_arrival_is_a_step_each_island_receives_all_of_them(tiny: dict[str, Any]) -> None:
    one, all_of_them = planned(tiny)["bytes"], planned(tiny, "sync.preset=async")["bytes"]
    assert (all_of_them["up"], all_of_them["down"]) == (one["up"], 3 * one["down"])


def test_bytes_are_left_out_until_the_vocabulary_is_known(tiny: dict[str, Any]) -> None:
    before = planned(tiny, "data.tokenizer=train:300")
    assert (before["bytes"], before["parameters"]) == (None, None)
    assert "diloco-ray prepare" in before["unknown"]
    assert "diloco-ray prepare" in str(plan_parts(before)[-1])
    open_run(RunConfig.from_dict(tiny, ["data.tokenizer=train:300"]))
    assert planned(tiny, "data.tokenizer=train:300")["bytes"]


def test_fragments_that_would_be_empty_are_refused_with_the_recipes_names(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"sync\.fragments=12.* 11 tensors"):
        planned(tiny, "sync.fragments=12")
    with pytest.raises(ConfigError, match=r"sync\.fragments=4 strided"):
        planned(tiny, "sync.preset=streaming")


def test_an_outline_has_the_shapes_of_the_model(tiny: dict[str, Any]) -> None:
    known = {"vocab_size": 300, "eos_token_id": 0}
    for fields in (tiny["model"], {"factory": "tests.model.plain_module:build"}):
        settings = ModelSettings(**fields)
        assert planned_shapes(settings, **known) == parameter_shapes(build_model(settings, seed=0, **known))
    assert planned_shapes(ModelSettings(path="somewhere"), **known) is None  # type: ignore[call-arg]


@pytest.mark.parametrize("command", [["plan"], ["train", "--dry-run"]], ids=" ".join)
def test_the_command_prints_and_leaves_nothing_behind(tiny: dict[str, Any], tmp_path: Path, command: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny, "sync": {"preset": "eager", "uplink": "int4"}}))
    done = CliRunner().invoke(app, [*command, str(recipe), "--set", "sync.downlink=int4"])
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    assert lines[0].startswith("preset eager: 4 rounds of 6 inner steps = 24; 3 islands")
    assert {"sync.overlap 6 preset", "sync.uplink int4 recipe", "sync.downlink int4 --set"} <= set(lines)
    assert "times as much" in lines[-1]
    assert not run_folder(tiny).parent.exists()
    assert "\x1b" not in done.output


def test_the_plan_as_json_is_one_document(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny))
    done = CliRunner().invoke(app, ["plan", str(recipe), "--json", "--name", "other"])
    document = json.loads(done.output)
    assert document["fields"]["name"] == {"value": "other", "from": "--set"}
    assert document["preset"] == "diloco"
    assert document["unknown"] == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["model.config={model_type: gpt2, n_positions: 16}"], ["n_positions=16", "data.sequence_length=32"]),
        (["model.config.max_position_embeddings=31"], ["max_position_embeddings=31", "data.sequence_length=32"]),
        (["model.weights=/nonexist"], ["no weights in /nonexist", "model.weights"]),
        (["model={path: /nonexist}"], ["no folder /nonexist", "model.path"]),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_any_data_is_prepared(
    tiny: dict[str, Any], fields: list[str], words: list[str]
) -> None:
    fields = [*fields, "data.tokenizer=train:300"]
    for refuse in (lambda: planned(tiny, *fields), lambda: open_run(RunConfig.from_dict(tiny, fields))):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert all(word in str(caught.value) for word in words)
        assert caught.value.remedy
    assert not Path(RunConfig.from_dict(tiny, fields).prepared_url).exists()
