"""The doctor finds what is wrong, says what to do, and leaves nothing behind."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diloco_ray.cli import app
from diloco_ray.doctor import Finding, examine


def findings(storage: str) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(storage)}


def test_a_good_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    found = findings(str(tmp_path / "runs"))["storage"]
    assert found.remedy == ""
    assert "creates once" in found.what
    assert list((tmp_path / "runs").iterdir()) == []


def test_folders_that_were_not_there_are_gone_again_and_the_disk_they_would_lie_on_is_looked_at(tmp_path: Path) -> None:
    found = findings(str(tmp_path / "not" / "there" / "runs"))
    assert found["storage"].remedy == ""
    assert found["disk of the runs"].what.endswith(f"GB free in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_measured_and_one_that_is_not_there_is_named(s3_bucket: str) -> None:
    assert findings(f"{s3_bucket}/doctor")["storage"].remedy == ""
    missing = findings("s3://no-such-bucket/runs")["storage"]
    assert "no-such-bucket" in missing.what
    assert missing.remedy


def test_storage_that_cannot_commit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = findings(str(tmp_path / "file" / "runs"))["storage"]
    assert found.remedy


@pytest.mark.parametrize(
    ("address", "mode", "token", "is_well"),
    [
        ("10.0.0.1:6379", "", "", False),
        ("10.0.0.1:6379", "token", "", False),
        ("10.0.0.1:6379", "token", "t", True),
        ("", "token", "", False),
        ("", "", "", True),
    ],
)
def test_a_missing_token_is_told_with_what_to_set(
    address: str, mode: str, token: str, is_well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray of this machine's own needs none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    done = CliRunner().invoke(app, ["doctor", "--storage", str(tmp_path / "runs")])
    assert done.exit_code == (not is_well), done.output
    assert ("what to do: " in done.output) == (not is_well)
    assert token not in done.output.split() or not token


def test_what_a_stretched_cluster_needs_is_printed_to_be_sourced() -> None:
    """The first two kept a node alive through a link that was cut for two minutes."""
    done = CliRunner().invoke(app, ["doctor", "--wan"])
    assert done.output.splitlines() == [
        "export RAY_health_check_failure_threshold=60",
        "export RAY_gcs_rpc_server_reconnect_timeout_s=900",
        "export RAY_AUTH_MODE=token",
        "export RAY_USE_TLS=1",
        "export RAY_TLS_SERVER_CERT=/etc/ray/tls/tls.crt",
        "export RAY_TLS_SERVER_KEY=/etc/ray/tls/tls.key",
        "export RAY_TLS_CA_CERT=/etc/ray/tls/ca.crt",
    ]
