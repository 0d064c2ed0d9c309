"""Credentials that a bucket does not take: the remedy names them, or the clock, or the policy, whichever it is."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diloco_ray.cli import main
from diloco_ray.errors import StoreError
from diloco_ray.log.run_store import RunStore
from tests.processes import write_recipe

boto3 = pytest.importorskip("boto3")
exceptions = pytest.importorskip("botocore.exceptions")
authorization = pytest.importorskip("moto.core.authorization")
s3fs = pytest.importorskip("s3fs")

NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SET_THEM = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the credentials of your storage; renew what expired"
LOOK_AT_THE_POLICY = "check the permissions of the folder, or the credentials and policy of the bucket"
SET_THE_CLOCK = "set this machine's clock, which requests are signed with"

Keys = tuple[str, ...]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Keys], None]]:
    """Gives this process other credentials: those, and no others."""
    for name, value in {
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)

    def take(keys: Keys) -> None:
        for name, value in zip_longest(NAMES, keys):
            if value:
                monkeypatch.setenv(name, value)
            else:
                monkeypatch.delenv(name, raising=False)
        s3fs.S3FileSystem.clear_instance_cache()

    yield take
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def users(s3_bucket: str) -> dict[str, Keys]:
    """Credentials of the bucket's storage: of a user who may only read, and of a role."""
    iam, may_read = boto3.client("iam"), {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [may_read]})
    iam.create_user(UserName="reader")
    iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
    user = iam.create_access_key(UserName="reader")["AccessKey"]
    role = iam.create_role(RoleName="lent", AssumeRolePolicyDocument=policy)["Role"]["Arn"]
    lent = boto3.client("sts").assume_role(RoleArn=role, RoleSessionName="of-these-tests")["Credentials"]
    return {
        "reader": (user["AccessKeyId"], user["SecretAccessKey"]),
        "role": (lent["AccessKeyId"], lent["SecretAccessKey"], lent["SessionToken"]),
    }


@pytest.fixture
def given(users: dict[str, Keys]) -> Iterator[dict[str, Keys]]:
    """The same, while the storage asks for them."""
    with authorization.enable_iam_authentication():
        yield users


@pytest.mark.parametrize(
    ("keys", "error", "remedy"),
    [
        (lambda given: (), "NoCredentialsError", SET_THEM),
        (lambda given: given["reader"][:1], "PartialCredentialsError", SET_THEM),
        (lambda given: ("AKIAOFNOBODY", "x"), "PermissionError: The AWS Access Key Id you provided", SET_THEM),
        (lambda given: (given["reader"][0], "x"), "PermissionError: The request signature", SET_THEM),
        (lambda given: (*given["role"][:2], "x"), "OSError: [Errno 22] The provided token", SET_THEM),
        (lambda given: given["reader"], "PermissionError: Access Denied", LOOK_AT_THE_POLICY),
    ],
    ids=["none", "half of them", "of nobody", "another secret", "another session", "may only read"],
)
def test_what_a_bucket_does_not_take_is_named(
    keys: Callable[[dict[str, Keys]], Keys],
    error: str,
    remedy: str,
    given: dict[str, Keys],
    take: Callable[[Keys], None],
    s3_bucket: str,
) -> None:
    take(keys(given))
    with pytest.raises(StoreError) as caught:
        RunStore(f"{s3_bucket}/run").probe()
    assert caught.value.what.startswith(f"cannot write: {error}")
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("ExpiredToken", SET_THEM),
        ("ExpiredTokenException", SET_THEM),  # which s3fs does not know
        ("InvalidToken", SET_THEM),
        ("InvalidAccessKeyId", SET_THEM),
        ("SignatureDoesNotMatch", SET_THEM),
        ("RequestTimeTooSkewed", SET_THE_CLOCK),
        ("AccessDenied", LOOK_AT_THE_POLICY),
        ("SlowDown", "the same command goes on from the last committed record when the storage answers again"),
    ],
)
def test_what_a_storage_answers_has_the_remedy_of_its_code(
    code: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As s3fs makes errors of botocore's answers."""
    answer = {"Error": {"Code": code, "Message": "as it says"}}

    def refuse(*_: Any, **__: Any) -> None:
        raise s3fs.errors.translate_boto_error(exceptions.ClientError(answer, "PutObject"))

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(StoreError, match="cannot write: ") as caught:
        RunStore("memory://refused").probe()
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(("who", "remedy"), [("reader", LOOK_AT_THE_POLICY), ("nobody", SET_THEM)])
def test_a_command_whose_bucket_refuses_it_ends_with_the_stores_exit_code(
    who: str,
    remedy: str,
    given: dict[str, Keys],
    take: Callable[[Keys], None],
    tiny: dict[str, Any],
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    take(given.get(who, ("AKIAOFNOBODY", "x")))
    recipe = write_recipe(tmp_path, {**tiny, "storage": {"path": f"{s3_bucket}/runs"}})
    monkeypatch.setattr(sys, "argv", ["diloco-ray", "train", str(recipe)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == StoreError.exit_code == 4
    told = capsys.readouterr().err
    assert told.startswith("error: cannot write: PermissionError: ")
    assert told.endswith(f"  what to do: {remedy}\n")
