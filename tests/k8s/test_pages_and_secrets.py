"""The pages say what the manifests do, and no file holds a secret."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import K8S, OVERLAYS, ROOT, entrypoints, render

PAGES = [ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "jobs.md", K8S / "README.md"]
SHOWN = [
    path for path in sorted([*K8S.rglob("*"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]) if path.is_file()
]
HOLDERS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "DILOCO_RAY_SECRET", "DILOCO_RAY_TOKEN", "RAY_AUTH_TOKEN"}
NO_VALUE = re.compile(r"FILL-IN|try|\.\.\.|['\"]?\$.*|<.*")
SHAPES = {
    "an access key of Amazon's": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token of a forge or hub": r"\b(?:gh[pousr]_|github_pat_|hf_|glpat-|xox[bp]-|sk-)[A-Za-z0-9_-]{20,}",
    "a web token": r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.",
    "forty random letters": r"(?<![\w/.])(?=\w)(?=[\w/+]*\d)(?=[\w/+]*[a-z])(?=[\w/+]*[A-Z])[\w/+]{40,}(?![\w/])",
}


def secrets_in(text: str) -> Iterator[str]:
    for what, shape in SHAPES.items():
        yield from (f"{what}: {found[:6]}..." for found in re.findall(shape, text))
    for name, value in re.findall(r"\b([A-Z_]{6,})(?:=|: )([^\s`,)]+)", text):
        if name in HOLDERS and not NO_VALUE.fullmatch(value):
            yield f"a value of {name}"


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_holds_a_secret(path: Path) -> None:
    assert list(secrets_in(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID: " + "AKIA" + "ABCDEFGHIJKLMNOP",
        "export DILOCO_RAY_SECRET=hunter2",
        "  DILOCO_RAY_TOKEN: eu-1.abcdef",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "key " + "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYzzzzzzzzzz",
    ],
)
def test_a_secret_would_be_found(text: str) -> None:
    assert list(secrets_in(text))


def test_templates_are_not_applied_and_hold_nothing() -> None:
    for overlay in OVERLAYS:
        assert "Secret" not in {document["kind"] for document in render(overlay)}
    for path in K8S.rglob("secrets.example.yaml"):
        for secret in yaml.safe_load_all(path.read_text()):
            assert set(secret["stringData"].values()) == {"FILL-IN"}
    assert "k8s/**/secrets.yaml" in (ROOT / ".gitignore").read_text().splitlines()


# ---- the pages ----


def pairs(value: Any) -> Iterator[tuple[str, str]]:
    """Every field with a plain value, as it is written in YAML."""
    for name, child in value.items() if isinstance(value, dict) else ((None, item) for item in value):
        if isinstance(child, dict | list):
            yield from pairs(child)
        elif name is not None:
            yield name, str(child).lower() if isinstance(child, bool) else str(child)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_field_that_a_page_names_with_its_value_has_it(page: Path) -> None:
    there = {pair for overlay in OVERLAYS for document in render(overlay) for pair in pairs(document)}
    names = {name for name, _ in there}
    told = [(name, value) for name, value in re.findall(r"`(\w+): ([^`]+)`", page.read_text()) if name in names]
    assert [pair for pair in told if pair not in there] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"k8s/(?:overlays|components)/[\w-]+(?:/[\w.-]+)?", text)
    assert [path for path in paths if not (ROOT / path).exists() and not path.endswith("/secrets.yaml")] == []
    links = re.findall(r"\]\(([^)#:]+\.\w+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_has_every_overlay_and_component() -> None:
    text = (K8S / "README.md").read_text()
    folders = [path.parent for path in K8S.glob("*/*/kustomization.yaml")]
    assert [folder.name for folder in folders if f"{folder.relative_to(K8S)}" not in text] == []


def test_the_pages_have_the_commands_of_the_manifests() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    told = [shlex.split(command) for command in re.findall(r"`(python jobs/[^`]+)`", text)]
    for overlay in ("coordinator", "island", "single-cluster"):
        assert entrypoints()[overlay] in told, overlay
