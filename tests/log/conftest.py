"""Stores of every kind; the bucket is a moto server's."""

import uuid
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diloco_ray.log.run_store import RunStore


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URL of a bucket of a moto server."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("test-bucket")
        yield "s3://test-bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


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
