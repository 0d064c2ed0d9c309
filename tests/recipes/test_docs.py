"""The documentation against the code: what a page names must be there, with the values that the code has."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from diloco_ray.cli import app
from diloco_ray.config import CHANGEABLE, RunConfig
from diloco_ray.presets import PRESETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| .+ \| (yes|no) \| .+ \|$", re.MULTILINE)


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field that is not a section, by its path in a recipe."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(fields_of(RunConfig))
RECIPE_PAGE = (DOCS / "recipes.md").read_text()
ROWS = {path: (default, change) for path, default, change in ROW.findall(RECIPE_PAGE)}


def as_in_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_in_the_recipe_page_with_its_default(path: str) -> None:
    assert path in ROWS, f"docs/recipes.md has no row for {path}"
    # Leading and trailing spaces of a text, as of the prompt, are part of it: YAML would strip them.
    text, default = ROWS[path][0][1:-1], as_in_yaml(FIELDS[path].default)
    shown = text if isinstance(default, str) else yaml.safe_load(text)
    assert (float(shown) if isinstance(default, float) else shown) == default


def test_the_recipe_page_names_no_field_that_is_not_there() -> None:
    assert set(ROWS) == set(FIELDS)


@pytest.mark.parametrize("path", FIELDS)
def test_the_recipe_page_says_which_fields_may_change(path: str) -> None:
    changeable = any(path == name or path.startswith(f"{name}.") for name in CHANGEABLE)
    assert ROWS[path][1] == ("yes" if changeable else "no")


def test_the_recipe_page_has_the_presets_with_the_fields_they_set() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ((?:`[\w.]+: [^`]+`(?:, )?)+|nothing: the defaults) \|$", RECIPE_PAGE, re.MULTILINE
    )
    told = {name: dict(re.findall(r"`([\w.]+): ([^`]+)`", fields)) for name, fields in rows}
    assert {name: {k: yaml.safe_load(v) for k, v in fields.items()} for name, fields in told.items()} == PRESETS


def test_the_readme_has_a_row_for_every_preset() -> None:
    family = (ROOT / "README.md").read_text().split("## The family")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", family, re.MULTILINE) == list(PRESETS)


TOKENS = [block for page in PAGES for block in page.read_text().split("\n\n") if "export RAY_AUTH_MODE=token " in block]


@pytest.mark.parametrize("commands", TOKENS)
def test_a_token_is_made_wherever_a_cluster_is_told_to_want_one(commands: str) -> None:
    """`ray start` makes none, and starts nothing without one."""
    words = ("RAY_AUTH_MODE", "ray get-auth-token --generate", "ray start --head")
    mode, made, start = (commands.find(word) for word in words)
    assert mode < made
    assert start < 0 or made < start


PLANS = re.findall(r"^\s*diloco-ray (plan .+?)(?:\s+#.*)?$", "\n".join(p.read_text() for p in PAGES), re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(PLANS))
def test_every_plan_that_a_page_asks_for_is_printed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0, done.output
    assert "preset streaming" in done.output


def test_the_recipe_page_names_every_recipe() -> None:
    named = set(re.findall(r"^\| `(\w+\.yaml)` \|", (DOCS / "recipes.md").read_text(), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "jobs").glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_and_page_that_a_page_names_is_there(page: Path) -> None:
    """Tests are named as `tests/room/test_file.py::test_name`, or `::test_name` for the file named before."""
    text = page.read_text()
    file = ""
    for named, test in re.findall(r"`((?:tests/[\w/]+\.py)?)(?:::(test_\w+))?`", text):
        file = named or file
        if named:
            assert (ROOT / named).is_file(), named
        if test:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    for link in re.findall(r"\]\(([^)#:]+\.\w+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link
