"""A storage of every kind for whole runs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.recovery.situation import Situation


@pytest.fixture
def situation(
    request: pytest.FixtureRequest, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Situation]:
    match getattr(request, "param", "memory"):
        case "local":
            monkeypatch.setattr(os, "fsync", lambda handle: None)  # it is for power cuts, and there is none here
            yield Situation(tiny, tmp_path, str(tmp_path / "killed"), tears=True)
        case "memory":
            yield Situation(tiny, tmp_path, "memory://killed")
            MemoryFileSystem().rm("/killed", recursive=True)
        case _:
            yield Situation(tiny, tmp_path, f"{request.getfixturevalue('s3_bucket')}/killed")
