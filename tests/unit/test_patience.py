"""A job gives up a host without a listener within seconds, but waits for one that has answered before."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
from faulty_server import FaultyServer
from s3fs import S3FileSystem

from core import remote
from core.remote import Retry
from data.files import Files
from launch.builders.runs import read_checkpoint


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Yield a port without a listener, which nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def urls(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return URLs that lead to no server."""
    nobody = f"http://127.0.0.1:{closed_port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": nobody,
        "STORAGE_EMULATOR_HOST": nobody,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    S3FileSystem.clear_instance_cache()  # of an earlier server
    return {
        "http": f"http://user:secret@127.0.0.1:{closed_port}/run",
        "unknown name": "http://user:secret@no.such.host.invalid/run",
        "s3": "s3://nobodys/run",
        "gs": "gs://nobodys/run",
    }


def test_where_nobody_listens_a_job_fails_within_seconds_in_one_sentence(urls: dict[str, str]) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"there is no connection to its host \(4 attempts failed") as met:
        remote.read_bytes(f"{urls['http']}/config.yaml")
    assert 3 < time.monotonic() - started < 6  # a server that is being started again may be there by then
    assert urls["http"].rpartition("@")[2] in str(met.value)
    assert "secret" not in str(met.value)


@pytest.mark.parametrize("kind", ["http", "unknown name", "s3", "gs"])
@pytest.mark.parametrize("read", [remote.read_bytes, remote.list_tree, Files, lambda url: read_checkpoint(url, str)])
def test_every_way_to_read_knows_that_nobody_listens(
    kind: str, read: Callable[[str], Any], urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "IMPATIENT_ATTEMPTS", 1)
    with pytest.raises(ValueError, match=r"there is no connection to its host \(1 attempts failed"):
        read(urls[kind])
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_has_answered_is_waited_for_when_it_refuses_connections(tmp_path: Path) -> None:
    """Wait as a running job does, longer than for a host that never answered."""
    (tmp_path / "a").write_bytes(b"content")
    patient = Retry(attempts=12, first_wait_sec=0.05, longest_wait_sec=0.3)
    server = FaultyServer(tmp_path)
    port = int(server.url.rpartition(":")[2])
    with server.running():
        assert remote.read_bytes(f"{server.url}/a", patient) == b"content"
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(remote.read_bytes(f"{server.url}/a", patient)))
    reader.start()
    time.sleep(1.5)  # four attempts would be over after half a second
    assert reader.is_alive()
    with FaultyServer(tmp_path, port=port).running():
        reader.join(10)
    assert found == [b"content"]


def test_a_host_that_answers_with_an_error_is_there(tmp_path: Path) -> None:
    with FaultyServer(tmp_path).running() as server:
        server.faults = {"a": ["500"] * 9}
        with pytest.raises(ValueError, match="6 attempts failed, the last with ClientResponseError: 500"):
            remote.read_bytes(f"{server.url}/a", Retry(attempts=6, first_wait_sec=0.01))
    with pytest.raises(ValueError, match="6 attempts failed, the last with ClientConnectorError"):
        remote.read_bytes(f"{server.url}/a", Retry(attempts=6, first_wait_sec=0.01))
