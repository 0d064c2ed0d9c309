"""A wrong address of a cluster is refused before Ray tries it for minutes."""

import socket

import pytest

from diloco_ray.errors import ClusterError
from diloco_ray.runtime.cluster import connected


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_named_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        wrong = address.format(free.getsockname()[1])
    with pytest.raises(ClusterError, match="no Ray cluster answers") as caught, connected(wrong):
        pass
    assert caught.value.where == wrong
