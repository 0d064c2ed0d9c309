"""What a machine and its storage are like before a run: each look says what was found and, if it is bad, the remedy."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from diloco_ray.errors import DiLoCoError
from diloco_ray.log.run_store import RunStore

PIECE_BYTES = 8 * 1024**2  # written and read back to see how fast the storage is
LEAST_FREE_BYTES = 2 * 1024**3
TOKEN_FILE = Path(".ray") / "auth_token"  # below the home folder, as Ray has it

# What keeps a node of a stretched Ray cluster through a link cut for two minutes; on every node before `ray start`.
WAN = {
    "RAY_health_check_failure_threshold": "60",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "900",
    "RAY_AUTH_MODE": "token",
    "RAY_USE_TLS": "1",
    "RAY_TLS_SERVER_CERT": "/etc/ray/tls/tls.crt",
    "RAY_TLS_SERVER_KEY": "/etc/ray/tls/tls.key",
    "RAY_TLS_CA_CERT": "/etc/ray/tls/ca.crt",
}


@dataclass(frozen=True)
class Finding:
    """what: one line. remedy: "" where nothing is wrong."""

    subject: str
    what: str
    remedy: str = ""


def examine(storage: str) -> Iterator[Finding]:
    """Finding by finding, as they are made. storage: a folder or an fsspec URL; a probe file is written and deleted."""
    store = RunStore(storage)
    yield _versions()
    yield _accelerators()
    yield _disk(
        "disk", tempfile.gettempdir(), "free some space, or set TMPDIR: Ray keeps logs and spilled objects there"
    )
    yield _token()
    if not store.is_local:
        yield _storage(store)
        return
    folders = [Path(store.url), *Path(store.url).parents]
    new = [folder for folder in folders if not folder.exists()]  # innermost first
    yield _disk("disk of the runs", str(folders[len(new)]), "free some space, or keep the runs elsewhere: storage.path")
    try:
        yield _storage(store)
    finally:
        with contextlib.suppress(OSError):  # not made after all, or no longer empty
            for folder in new:
                folder.rmdir()


def _versions() -> Finding:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers"))
    return Finding("versions", f"Python {platform.python_version()}, {found}")


def _accelerators() -> Finding:
    if not torch.cuda.is_available():
        return Finding("accelerators", f"no GPU that torch can use; {os.cpu_count()} CPUs")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("accelerators", f"{len(names)}: {', '.join(dict.fromkeys(names))}")


def _disk(subject: str, folder: str, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free
    return Finding(subject, f"{free / 1e9:.1f} GB free in {folder}", remedy if free < LEAST_FREE_BYTES else "")


def _token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or (Path.home() / TOKEN_FILE).exists()
    if mode != "token":
        what, remedy = f"RAY_AUTH_MODE is {mode or 'not set'}", "export RAY_AUTH_MODE=token"
        if os.environ.get("RAY_ADDRESS"):
            return Finding("Ray's token", what, f"{remedy} on every node and where jobs are submitted")
        return Finding("Ray's token", f"{what}: well for a Ray that `train` starts here; for a cluster, {remedy}")
    remedy = "" if has_token else "run `ray get-auth-token --generate`, and give every node the same token"
    return Finding("Ray's token", "there" if has_token else "RAY_AUTH_MODE is token, and there is none", remedy)


def _storage(store: RunStore) -> Finding:
    path, piece = f".doctor-{uuid.uuid4().hex}", os.urandom(PIECE_BYTES)
    try:
        store.probe()
        began_s = time.monotonic()
        store.write(path, piece)
        wrote_s = time.monotonic()
        returned = store.read(path)
        read_s = time.monotonic()
        store.delete(path)
    except DiLoCoError as error:
        return Finding("storage", f"{error.what} ({error.where})", error.remedy or "see what the storage says")
    up, down = (PIECE_BYTES / max(seconds, 1e-9) / 1e6 for seconds in (wrote_s - began_s, read_s - wrote_s))
    remedy = "" if returned == piece else "it gives back other bytes than were written: do not use it"
    return Finding("storage", f"{store.url} creates once; {up:,.0f} MB/s up, {down:,.0f} MB/s down", remedy)
