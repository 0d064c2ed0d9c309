"""Stores of every kind."""

import uuid
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diloco_ray.log.run_store import RunStore


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunStore]:
    """An empty store of every kind, under a name with a space."""
    name = f"run {uuid.uuid4().hex[:8]}"
    match request.param:
        case "local":
            yield RunStore(str(tmp_path_factory.mktemp("runs") / name))
        case "memory":
            yield RunStore(f"memory://{name}")
            if MemoryFileSystem().exists(f"/{name}"):
                MemoryFileSystem().rm(f"/{name}", recursive=True)
        case _:
            yield RunStore(f"{request.getfixturevalue('s3_bucket')}/{name}")
