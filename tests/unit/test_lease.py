"""One job at a time trains in a bucket; only a dead holder is replaced."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gcs_server import BUCKET, gcs_server
from s3_server import s3_server

from core import remote
from launch.command.app import CONF
from train import holder
from train.holder import Holder, read_holder, this_process
from train.lease import MAX_BYTES, Lease, LeaseLostError

PERIOD_SEC = 0.2


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of an empty bucket on a local server."""
    with {"s3": s3_server, "gs": gcs_server}[request.param]():
        yield f"{request.param}://{BUCKET}"


def put(url: str, who: Holder) -> None:
    remote.write_bytes(url, who.to_json())


def seconds_to_take(url: str, period_sec: float = PERIOD_SEC) -> float:
    started = time.monotonic()
    with Lease(url, "the run", period_sec).held():
        return time.monotonic() - started


def test_two_machines_cannot_train_in_one_bucket(bucket: str) -> None:
    url = f"{bucket}/lease/lock.json"
    refused = pytest.raises(ValueError, match=f"in the run .*process {os.getpid()}")
    with Lease(url, "the run", PERIOD_SEC).held(), refused, Lease(url, "the run", PERIOD_SEC).held():
        pass
    with Lease(url, "the run", PERIOD_SEC).held():
        pass
    assert remote.list_tree(f"{bucket}/lease") == []


def test_a_lease_whose_holder_is_dead_is_taken_over_and_he_notices_if_he_was_not(bucket: str) -> None:
    url = f"{bucket}/dead/lock.json"
    elsewhere = replace(this_process(), host="elsewhere", pid=1, boot="another")
    put(url, elsewhere)
    started = time.monotonic()
    first = Lease(url, "the run", PERIOD_SEC)
    with first.held():
        assert time.monotonic() - started >= 3 * PERIOD_SEC
        first.check()
        put(url, elsewhere)
        time.sleep(1.0)
        with pytest.raises(LeaseLostError, match="host elsewhere, process 1"):
            first.check()
    assert remote.read_bytes(url) == elsewhere.to_json()  # who lost it does not take it away
    put(url, replace(this_process(), pid=2**22 + 1))
    assert seconds_to_take(url, period_sec=2.0) < 3


@pytest.fixture
def url() -> Iterator[str]:
    """Yield the URL of a lock in a bucket."""
    with gcs_server():
        yield f"gs://{BUCKET}/run/lock.json"


TAKE = """
import sys, time
from train.lease import Lease
try:
    with Lease(sys.argv[1], "the run", float(sys.argv[2])).held():
        print("taken", flush=True)
        time.sleep(float(sys.argv[3]))
except ValueError as error:
    print(error)
"""


def start(*before: str, url: str, period_sec: float = PERIOD_SEC, hold_sec: float = 0.0) -> "subprocess.Popen[str]":
    """Start a process that takes the lease, or says why not."""
    words = [*before, sys.executable, "-c", TAKE, url, str(period_sec), str(hold_sec)]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=CONF.parent, env=environment)


def can_unshare() -> bool:
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(words, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="this machine lets nobody make a namespace of processes")
@pytest.mark.parametrize("container", [["unshare", "--pid", "--fork"], ["unshare", "--pid", "--fork", "--mount-proc"]])
def test_a_container_of_the_same_host_name_does_not_take_the_lease_of_a_live_holder(
    container: list[str], url: str
) -> None:
    """Check a process in another namespace, where the holder's process id belongs to no process."""
    with Lease(url, "the run", PERIOD_SEC).held():
        other = start(*container, url=url)
        assert f"process {os.getpid()}); wait for it" in other.communicate(timeout=60)[0]


@pytest.mark.skipif(not can_unshare(), reason="this machine lets nobody make a namespace of processes")
def test_a_live_holder_in_a_container_keeps_its_lease(url: str) -> None:
    other = start("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", url=url, hold_sec=60)
    assert other.stdout is not None
    assert other.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match="Another process is training in the run"):
        seconds_to_take(url)
    other.kill()
    other.wait()
    assert seconds_to_take(url) >= 3 * PERIOD_SEC  # nobody here can know that it died


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(reaped: bool, url: str) -> None:
    other = start(url=url, period_sec=5.0, hold_sec=60)
    assert other.stdout is not None
    assert other.stdout.readline() == "taken\n"
    other.kill()
    if reaped:
        other.wait()
    else:  # its parent has not asked for it yet
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    assert seconds_to_take(url, period_sec=5.0) < 3
    other.wait()


def test_only_an_end_that_is_certain_counts() -> None:
    me = this_process()
    assert not me.is_gone()
    ended = replace(me, pid=2**22 + 1)
    assert ended.is_gone()
    assert replace(me, started=(me.started or 0) + 1).is_gone()  # a later process of its number
    for field in ("host", "boot", "pid_namespace"):
        assert not replace(ended, **{field: "another"}).is_gone()
        assert not replace(ended, **{field: "" if field == "host" else None}).is_gone()
    assert not replace(ended, started=None).is_gone()


def test_where_a_machine_does_not_say_who_a_process_is_only_signs_of_life_count(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hide /proc, as on another system than Linux, or show that of another namespace."""
    ended = replace(this_process(), pid=2**22 + 1)
    for proc in (tmp_path / "none", tmp_path):
        (tmp_path / "self").unlink(missing_ok=True)
        (tmp_path / "self").symlink_to(str(os.getpid() + 1))
        monkeypatch.setattr(holder, "_PROC", proc)
        me = this_process()
        assert (me.boot, me.pid_namespace, me.started) == (None, None, None)
        assert not ended.is_gone()
    put(url, me)
    assert seconds_to_take(url) >= 3 * PERIOD_SEC


OLD = b'{"owner": "x", "host": "elsewhere", "pid": 1, "beat": 3}'  # of a version without hashes
JUNK = [b"", b"null", b"[]", b"{", b"3", b'"x"', b'{"owner": null}', b"[" * 10_000, bytes(MAX_BYTES + 1), b"\xff\xfe"]
JUNK += [OLD.replace(b"1", b"null"), OLD.replace(b"1", b"-1"), OLD.replace(b"elsewhere", b"\\u001b[2J")]


@pytest.mark.parametrize("content", [*JUNK, OLD], ids=lambda content: repr(content[:20]))
def test_a_lock_that_nobody_can_read_is_waited_for_and_then_taken_over(content: bytes, url: str) -> None:
    remote.write_bytes(url, content)
    assert seconds_to_take(url) >= 3 * PERIOD_SEC
    assert (read_holder(content, "lock.json") is None) == (content != OLD)


def test_a_lock_that_nobody_can_read_but_somebody_renews_is_respected(url: str) -> None:
    remote.write_bytes(url, b"of a later version, beat 1")
    renewal = threading.Timer(0.5, lambda: remote.write_bytes(url, b"of a later version, beat 2"))
    renewal.start()
    with pytest.raises(ValueError, match=r"Another process is training in the run \(its lock does not say which one"):
        seconds_to_take(url, period_sec=1.0)
    renewal.join()
    remote.remove(url)


def test_no_flipped_bit_makes_another_holder_of_a_lock() -> None:
    content = this_process().to_json()
    assert read_holder(content, "lock.json") is not None
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            found = read_holder(bytes(flipped), "lock.json")
            assert found is None or found.to_json() == content, (place, bit)
    assert json.loads(content)["boot"] == this_process().boot
