"""Recipes: every wrong one is refused before anything is spent, with what, where and a remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from diloco_ray.api import DiLoCoTrainer
from diloco_ray.config import RunConfig, differences
from diloco_ray.document import outer_of
from diloco_ray.errors import ConfigError

JOBS = Path(__file__).resolve().parents[1] / "jobs"
RECIPES = sorted(JOBS.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_named_after_its_file(recipe: Path) -> None:
    config = RunConfig.from_yaml(recipe)
    assert config.run_url == f"runs/{recipe.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_survives_the_way_through_run_json(recipe: Path) -> None:
    config = RunConfig.from_yaml(recipe)
    assert RunConfig.from_dict(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("outr.learning_rate=1", ["unknown key outr", "did you mean outer?"]),
        ("outer.lerning_rate=1", ["unknown key outer.lerning_rate", "did you mean learning_rate?"]),
        ("preset=eager", ["unknown key preset", "did you mean sync.preset?"]),
        ("learning_rate=1", ["unknown key learning_rate", "did you mean inner.learning_rate or outer.learning_rate?"]),
        ("inner.fragments=2", ["unknown key inner.fragments", "did you mean sync.fragments?"]),
        ("sync.zzz=1", ["unknown key sync.zzz", "choose one of", "heartbeat_every_s"]),
        ("inner.accumulate=3", ["batch_size=8", "accumulate=3"]),
        ("sync.uplink=int9", ["sync.uplink=int9", "int8"]),
        ("islands=[3, 2]", ["islands=[3, 2]", "least <= most"]),
        ("islands=0", ["islands=[0, 0]"]),
        ("sync.quorum=9", ["sync.quorum=9", "islands=[4, 4]"]),
        ("outer.learning_rate=fast", ["outer.learning_rate", "'fast'"]),
        ("outer.momentum=1.0", ["outer.momentum", "less than 1"]),
        ("sync.heartbeat_timeout_s=1", ["heartbeat_timeout_s=1", "at least 4"]),
        ("cluster.island_resources={CPU: 0}", ["island_resources", "positive"]),
        ("name=a/b", ["name"]),
        ("model.path=x", ["exactly one of config, path, factory"]),
        ("data.validation_fraction=0.7", ["data.validation_fraction"]),
        ("inner.lr=2", ["unknown key inner.lr", "did you mean learning_rate?"]),
        ("data.tokenizer=trian:300", ["'trian:300'", "did you mean train:300"]),
        ("data.tokenizer=bytes:x", ["did you mean bytes, train:4096"]),
        ("learning_rate", ["not field=value", "outer.learning_rate=0.6"]),
        ("seed.x=1", ["seed in override", "section"]),
        ("sync.preset=eagr", ["unknown preset 'eagr'", "did you mean eager?"]),
        ("sync.overlap=26", ["sync.overlap=26", "inner.steps_per_round=25", "choose sync.overlap from 0 to 25"]),
        ("sync.overlap=-1", ["sync.overlap", "-1", "greater than or equal to 0"]),
        ("sync.mixing=1.5", ["sync.mixing", "1.5", "less than or equal to 1"]),
        ("sync.mixing=-0.1", ["sync.mixing", "-0.1", "greater than or equal to 0"]),
        ("sync.error_feedback=0", ["sync.error_feedback", "greater than 0"]),
        ("sync.grace_share=2", ["sync.grace_share", "less than or equal to 1"]),
        ("sync.downlink=topk", ["sync.downlink=topk is no codec of the downlink", "choose one of float32"]),
        ("sync.uplink=int5", ["sync.uplink=int5 is no codec of the uplink", "did you mean int"]),
        ("sync.fragments=0", ["sync.fragments", "greater than or equal to 1"]),
        ("experiment.drop_probability=1", ["experiment.drop_probability", "less than 1"]),
        ("experiment.speeds=[1, 0]", ["experiment.speeds.1", "greater than 0"]),
        ("experiment.speeds=[2]", ["experiment.speeds.0", "less than or equal to 1"]),
        *[
            (f"{field}={value}", [field, f"given: {given}", f"write {field} as a"])
            for field in ("inner.learning_rate", "inner.epsilon", "inner.clip_norm", "sync.grace_s", "sync.mixing")
            for value, given in ((".inf", "inf"), (".nan", "nan"), ("true", "True"), ("'3'", "'3'"))
        ],
        ("outer.learning_rate=true", ["outer.learning_rate", "True", "choose one such as 0.7"]),
        ("outer.learning_rate=.inf", ["outer.learning_rate", "inf", "choose one such as 0.7"]),
        ("inner.betas=[0.9, 1.5]", ["inner.betas.1", "1.5", "choose inner.betas.1 below 1"]),
        ("inner.betas=[-0.1, 0.9]", ["inner.betas.0", "-0.1", "choose inner.betas.0 at least 0"]),
        ("inner.betas=[.nan, 0.9]", ["inner.betas.0", "nan", "a finite number"]),
        ("inner.betas=0.9", ["inner.betas", "0.9", "a list such as"]),
        ("model.config.rms_norm_eps=.nan", ["model", "nan", "write finite numbers"]),
        ("seed=-1", ["seed", "-1", "choose seed at least 0"]),
        (f"seed={2**63}", ["seed", str(2**63), "choose seed at most 9223372036854775807"]),
        ("rounds=0", ["rounds", "0", "choose rounds at least 1"]),
        ("rounds=true", ["rounds", "True", "write rounds as a whole number"]),
        ("rounds='3'", ["rounds", "'3'", "without quotes"]),
        ("rounds=2.5", ["rounds", "2.5", "a whole number"]),
        ("islands=0", ["islands=[0, 0]", "choose [least, most]"]),
        ("islands=true", ["islands", "True", "give a whole number such as 4"]),
        ("islands=[2.0, '3']", ["islands.0", "2.0", "islands.1", "'3'", "a whole number"]),
        ("islands=[1, 2, 3]", ["islands", "[1, 2, 3]"]),
        ("inner.compile=1", ["inner.compile", "1", "true or false"]),
        ("name=3", ["name", "3", "text, in quotes"]),
        ("sync.error_feedback=true", ["sync.error_feedback", "True", "a number such as 0.5"]),
        ("sync.overlap=H", ["sync.overlap", "'H'", "write inner.steps_per_round's number"]),
        ("sync.mixing=1.5", ["choose sync.mixing at most 1"]),
        ("outer.combine=mediam", ["outer.combine", "'mediam'", "did you mean median?"]),
        ("outer.optimizer=nestrov", ["outer.optimizer", "'nestrov'", "did you mean nesterov? There are nesterov, sgd"]),
        ("experiment.speeds=[1, 1, 1, 1, 0.5]", ["[1.0, 1.0, 1.0, 1.0, 0.5]", "the 4 islands", "give at most 4"]),
        ("experiment.islands_by_round=sometimes", ["experiment.islands_by_round", "'ramp_up'", "'sometimes'"]),
    ],
)
def test_a_wrong_override_is_refused_with_its_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(JOBS / "quickstart.yaml", [override])
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "what to do:" in text
    assert "as said above" not in text


def test_a_refusal_says_whether_the_command_line_or_the_recipe_is_wrong(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("rounds: -1\nmodel: {path: here}\n")
    for overrides, where in (
        (["rounds=0"], "--set"),
        (["rounds=1", "islands=[2.0, 3]", "no_such_key=1"], "--set"),
        (["islands=[2.0, 3]"], str(recipe)),
        ([], str(recipe)),
    ):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_yaml(recipe, overrides)
        assert caught.value.where == where


@pytest.mark.parametrize(("written", "value"), [("1", 1.0), ("1e-3", 0.001), ("2.5e3", 2500.0), ("1.0e+3", 1000.0)])
def test_a_number_may_be_whole_and_have_any_exponent(written: str, value: float) -> None:
    fields = ("inner.learning_rate", "outer.learning_rate", "sync.launch_interval_s", "inner.clip_norm")
    config = RunConfig.from_yaml(JOBS / "quickstart.yaml", [f"{field}={written}" for field in fields])
    numbers = (config.inner.learning_rate, config.outer.learning_rate)
    assert (*numbers, config.sync.launch_interval_s, config.inner.clip_norm) == (value,) * 4
    assert RunConfig.from_yaml(JOBS / "quickstart.yaml", ["inner.betas=[0, 1e-1]"]).inner.betas == (0.0, 0.1)


@pytest.mark.parametrize("closes", ["all", "quorum", "arrival"])
def test_delayed_nesterov_waits_for_as_many_steps_as_islands_only_where_each_has_its_own(
    tiny: dict[str, Any], closes: str
) -> None:
    fields = ["outer.optimizer=delayed_nesterov", f"sync.closes={closes}"]
    outer = outer_of({"config": RunConfig.from_dict(tiny, fields).model_dump(mode="json")})
    assert outer.arrivals == (3 if closes == "arrival" else 1)
    given = RunConfig.from_dict(tiny, [*fields, "outer.arrivals=2"]).model_dump(mode="json")
    assert outer_of({"config": given}).arrivals == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sync.preset=decoupled", "sync.quorum=5"], ["sync.quorum=5", "islands=[4, 4]", "choose 1 to 4, or null"]),
        (["sync.preset=decoupled", "sync.closes=all"], ["sync.quorum=1", "choose 4 to 4, or null"]),
        (["sync.preset=eager", "outer.combine=radial"], ["outer.combine=radial", "set outer.combine=mean"]),
        (["sync.preset=eager", "outer.combine=median"], ["outer.combine=median", "set outer.combine=mean"]),
        (["sync.preset=eager", "outer.optimizer=adam"], ["outer.optimizer=adam", "choose nesterov, sgd or heavy_ball"]),
        (["sync.preset=eager", "outer.optimizer=delayed_nesterov"], ["delayed_nesterov", "choose nesterov"]),
        (["sync.preset=eager", "sync.overlap=5"], ["sync.overlap=5", "steps_per_round=25", "set sync.overlap=25"]),
        (
            ["sync.preset=async", "sync.fragments=2"],
            ["closes=arrival", "fragments=2", "choose sync.fragments=1", "sync.closes=quorum with outer.optimizer="],
        ),
        (["sync.preset=async", "sync.quorum=2"], ["closes=arrival", "quorum=2", "leave sync.quorum at null"]),
        (
            ["sync.preset=async", "experiment.drop_probability=0.3"],
            ["experiment.drop_probability=0.3", "sync.closes=arrival", "set sync.closes=all"],
        ),
        (
            ["sync.preset=decoupled", "experiment.islands_by_round=doubling"],
            ["experiment.islands_by_round=doubling", "sync.closes=quorum", "set sync.closes=all"],
        ),
        (
            ["sync.weighting=examples", "outer.combine=trimmed_mean"],
            ["sync.weighting=examples", "outer.combine=trimmed_mean", "choose sync.weighting=uniform"],
        ),
        (
            ["sync.preset=delayed", "experiment.drop_probability=0.3"],
            ["sync.overlap=25", "experiment.drop_probability=0.3", "choose sync.overlap below 25"],
        ),
        (
            ["sync.preset=streaming", "sync.partition=sequential", "inner.steps=by_speed"],
            ["sync.overlap=5", "inner.steps=by_speed", "set sync.overlap=0, or sync.closes=quorum"],
        ),
        (["sync.overlap=5", "sync.preset=data_parallel"], ["sync.overlap=5", "steps_per_round=1"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_fields_that_do_not_go_together_are_refused_with_values_and_remedy(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(JOBS / "quickstart.yaml", overrides)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert caught.value.remedy


def test_a_quorum_below_the_least_islands_is_for_steps_that_do_not_wait_for_all() -> None:
    decoupled = RunConfig.from_yaml(JOBS / "quickstart.yaml", ["sync.preset=decoupled"])
    assert (decoupled.min_islands, decoupled.quorum) == (4, 1)
    assert RunConfig.from_yaml(JOBS / "quickstart.yaml", ["sync.closes=quorum"]).quorum == 1
    assert RunConfig.from_yaml(JOBS / "quickstart.yaml").quorum == 4


def test_a_missing_recipe_and_one_that_is_not_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        RunConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        RunConfig.from_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        RunConfig.from_yaml(tmp_path / "list.yaml")


def test_overrides_have_yaml_values_and_reach_into_the_models_own_fields() -> None:
    config = RunConfig.from_yaml(
        JOBS / "quickstart.yaml",
        ["islands=[2, 6]", "model.config.hidden_size=64", "inner.clip_norm=null", "name=other"],
    )
    assert (config.min_islands, config.max_islands) == (2, 6)
    assert config.model.config is not None
    assert config.model.config["hidden_size"] == 64
    assert config.inner.clip_norm is None
    assert config.run_url == "runs/other"


def test_what_a_run_is_does_not_depend_on_where_and_how_long_it_runs(tiny: dict[str, Any]) -> None:
    one = RunConfig.from_dict(tiny)
    elsewhere = ["rounds=9", "islands=[1, 5]", "storage.path=/elsewhere", "evaluation.every_rounds=1"]
    patience = ["sync.grace_s=5", "sync.grace_share=0.5", "sync.launch_interval_s=1", "sync.max_staleness=3"]
    same = RunConfig.from_dict(tiny, [*elsewhere, *patience, "experiment.speeds=[0.5]"])
    other = RunConfig.from_dict(tiny, ["outer.momentum=0.5", "seed=1"])
    assert differences(one.identity(), same.identity()) == []
    assert differences(one.identity(), other.identity()) == ["outer.momentum: 0.9 -> 0.5", "seed: 7 -> 1"]
    for changed in ("sync.overlap=3", "sync.closes=quorum", "experiment.drop_probability=0.5", "inner.steps=by_speed"):
        assert differences(one.identity(), RunConfig.from_dict(tiny, [changed]).identity()), changed


def test_prepared_data_is_shared_by_runs_on_the_same_text(tiny: dict[str, Any]) -> None:
    one, longer = RunConfig.from_dict(tiny), RunConfig.from_dict(tiny, ["data.sequence_length=64", "name=b"])
    other = RunConfig.from_dict(tiny, ["data.tokenizer=train:300"])
    assert one.prepared_url == longer.prepared_url != other.prepared_url


def test_a_recipe_is_plain_yaml_with_sections() -> None:
    sections = set(RunConfig.model_fields)
    for recipe in RECIPES:
        assert set(yaml.safe_load(recipe.read_text())) <= sections


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["inner.ranks=3"], ["batch_size=8 with ranks=3 and accumulate=1", "a multiple of 3"]),
        (["inner.ranks=2", "inner.accumulate=8"], ["ranks=2 and accumulate=8", "a multiple of 16"]),
        (["inner.ranks=2", "inner.compile=true"], ["compile=true with ranks=2", "set inner.compile=false"]),
        (
            ["inner.ranks=2", "inner.parallel=fsdp", "inner.optimizer=muon"],
            ["optimizer=muon with ranks=2 and parallel=fsdp", "set inner.parallel=ddp"],
        ),
        (["inner.ranks=0"], ["choose inner.ranks at least 1"]),
        (["cluster.rank_timeout_s=0"], ["choose cluster.rank_timeout_s at least 1"]),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_with_its_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(JOBS / "quickstart.yaml", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ranks_are_part_of_what_a_run_is() -> None:
    one, two = (RunConfig.from_yaml(JOBS / "quickstart.yaml", [f"inner.ranks={n}"]).identity() for n in (1, 2))
    assert differences(one, two) == ["inner.ranks: 1 -> 2"]


def test_overrides_may_be_a_mapping_of_fields_or_sections() -> None:
    given = {"rounds": 3, "outer": {"learning_rate": 0.5}, "cluster.island_resources": {"GPU": 1}}
    config = RunConfig.from_yaml(JOBS / "quickstart.yaml", given)
    said = ["rounds=3", "outer.learning_rate=0.5", "cluster.island_resources={GPU: 1}"]
    assert config == RunConfig.from_yaml(JOBS / "quickstart.yaml", said)
    assert config.cluster.island_resources == {"GPU": 1}
    assert RunConfig.from_yaml(JOBS / "quickstart.yaml", "rounds=3").rounds == 3


def test_what_cannot_be_is_refused_in_the_same_words_where_a_recipe_is_made_in_python(tiny: dict[str, Any]) -> None:
    assert RunConfig(**tiny) == RunConfig.from_dict(tiny)
    for body in ({**tiny, "outer": {"lr": 3}}, {**tiny, "rounds": 0}):
        with pytest.raises(ConfigError) as caught:
            RunConfig(**body)
        with pytest.raises(ConfigError) as expected:
            RunConfig.from_dict(body)
        assert (caught.value.what, caught.value.remedy) == (expected.value.what, expected.value.remedy)


def test_a_trainer_takes_the_path_of_a_recipe() -> None:
    path = JOBS / "quickstart.yaml"
    assert DiLoCoTrainer(path).config == DiLoCoTrainer(str(path)).config == RunConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="no recipe at"):
        DiLoCoTrainer("jobs/none.yaml")
