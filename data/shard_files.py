"""Where the files of a folder of shards lie: on a local disk, or behind a URL with a cache on a local disk."""

import hashlib
import mmap
import os
import queue
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from io import BufferedReader
from pathlib import Path
from typing import Protocol, TypeVar

from core.names import inside, plain_name
from core.reading import DamagedFileError, is_absent, open_regular, read_regular, remedied, sha256_of
from core.remote import DEFAULT_RETRY, DamagedError, Retry, download, join, read_limited, with_retries
from data.cache import Cache, CachedFile
from data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from data.shard_index import INDEX_NAME

Result = TypeVar("Result")

OTHER_OPEN_FILES = 512  # that a process may have beside its shards
REPAIR = "run the same `ditscale encode` again, which rewrites just what is damaged"
REMOTE_REPAIR = "copy it there again from the folder of `ditscale encode`, which `ditscale verify repair=true` mends"


class ShardFiles(Protocol):
    """Reads the files that a manifest lists. Each method raises ValueError that names a missing or damaged file."""

    manifest: Manifest
    repair: str  # what to do about a damaged file
    keeps_all: bool  # whether all shards are at hand at all times, so that nobody need expect any

    def read_index(self) -> bytes:
        """The content of the index."""
        ...

    def map(self, shard: int) -> mmap.mmap:
        """The bytes of an expected shard, mapped read-only; waits until they are at hand."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """The shards that are needed now and next, in this order; others may go."""
        ...

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """Raise ValueError where that many of the shards cannot be at hand together. Another order may need fewer."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class LocalShardFiles:
    """A folder. Every file is checked at the start: its size and, with ``verify_checksums``, its content."""

    keeps_all = True
    repair = REPAIR

    def __init__(self, folder: Path, verify_checksums: bool) -> None:
        self.manifest = Manifest.load(folder)
        self._folder = folder
        _allow_open_files(len(self.manifest.shards))
        for shard in self.manifest.shards:
            self._open(shard, verify_checksums).close()

    def read_index(self) -> bytes:
        """As `ShardFiles` says."""
        try:
            with remedied(REPAIR):
                content = read_regular(self._path(INDEX_NAME), self.manifest.max_index_bytes)
        except OSError as error:
            raise self._unreadable(INDEX_NAME, error) from error
        self._require_hash(INDEX_NAME, self.manifest.index_sha256, hashlib.sha256(content).hexdigest())
        return content

    def map(self, shard: int) -> mmap.mmap:
        """As `ShardFiles` says."""
        with self._open(self.manifest.shards[shard], verify=False) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def expect(self, shards: Sequence[int]) -> None:
        """All are at hand."""

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """There is room for all."""

    def close(self) -> None:
        """Nothing runs in the background."""

    def _path(self, name: str) -> Path:
        return inside(self._folder, name, str(self._folder / MANIFEST_NAME))

    def _open(self, shard: ShardEntry, verify: bool) -> BufferedReader:
        """A shard's file, found to have its size and, with ``verify``, its content."""
        path = self._path(shard.name)
        try:
            with remedied(REPAIR):
                file = open_regular(path)
        except OSError as error:
            raise self._unreadable(shard.name, error) from error
        try:
            if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
                raise DamagedFileError(self._wrong_size(shard, size))
            if verify:
                self._require_hash(shard.name, shard.sha256, hashlib.file_digest(file, "sha256").hexdigest())
        except BaseException:
            file.close()
            raise
        return file

    def _require_hash(self, name: str, expected: str, found: str) -> None:
        if found != expected:
            path = self._folder / name
            raise DamagedFileError(
                f"{path} is damaged: the manifest says sha256 {expected}, the file has {found}; {REPAIR}."
            )

    def _wrong_size(self, shard: ShardEntry, size: int) -> str:
        found = "" if size > shard.bytes else f", {sha256_of(self._path(shard.name))} found"  # the other may be endless
        return (
            f"{self._folder / shard.name} is damaged: the manifest says {shard.bytes} bytes, the file has {size} "
            f"(sha256 {shard.sha256} expected{found}); {REPAIR}."
        )

    def _unreadable(self, name: str, error: OSError) -> Exception:
        """Return the error to raise for a file that cannot be opened."""
        if is_absent(error):
            return DamagedFileError(f"{self._folder / name} is missing, but the manifest lists it; {REPAIR}.")
        return error


class RemoteShardFiles:
    """A URL, and a `Cache` into which ``num_threads`` threads fetch shards ahead of need.

    What is fetched is checked against the manifest's SHA-256; so is a copy that the cache already has, with
    ``verify_checksums``, when this process first uses it.
    """

    keeps_all = False
    repair = REMOTE_REPAIR

    def __init__(
        self, url: str, cache: Cache, verify_checksums: bool, retry: Retry = DEFAULT_RETRY, num_threads: int = 4
    ) -> None:
        self._url = url
        self._cache = cache
        self._verify = verify_checksums
        self._retry = retry
        self.manifest = Manifest.load(url, retry)
        _allow_open_files(len(self.manifest.shards))
        self._ahead = FetchedAhead(self._mapped, num_threads)

    def read_index(self) -> bytes:
        """As `ShardFiles` says."""
        url = join(self._url, INDEX_NAME)

        def read() -> bytes:
            content = read_limited(url, self.manifest.max_index_bytes, self._retry.timeout_sec)
            _require_content(url, self.manifest.index_sha256, hashlib.sha256(content).hexdigest())
            return content

        return self._whole(url, read)

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """As `ShardFiles` says."""
        largest = sorted((shard.bytes for shard in self.manifest.shards), reverse=True)[:num_shards]
        if (needed := sum(largest)) > self._cache.limit_bytes:
            fewer = "choose data/order=windowed with fewer data.order.shards_per_window"
            raise ValueError(
                f"data.cache_bytes is {self._cache.limit_bytes}, but the {len(largest)} shards of {self._url} that "
                f"data.order needs at a time have {needed} bytes; raise data.cache_bytes, or "
                f"{fewer if can_be_fewer else 'encode with a smaller data.samples_per_shard'}."
            )

    def map(self, shard: int) -> mmap.mmap:
        """As `ShardFiles` says."""
        return self._ahead.get(shard)

    def expect(self, shards: Sequence[int]) -> None:
        """As `ShardFiles` says: fetching of the missing ones begins."""
        self._cache.needed = frozenset(self.manifest.shards[shard].sha256 for shard in shards)
        self._ahead.want(shards)

    def close(self) -> None:
        """As `ShardFiles` says."""
        self._cache.stopped.set()
        self._ahead.close()

    def _mapped(self, shard: int) -> mmap.mmap:
        entry = self.manifest.shards[shard]
        return self._cache.map(
            CachedFile(entry.sha256, entry.bytes), lambda path: self._fetch(entry, path), self._verify
        )

    def _fetch(self, entry: ShardEntry, to: Path) -> None:
        url = join(self._url, plain_name(entry.name, join(self._url, MANIFEST_NAME)))

        def fetch() -> None:
            download(url, to, entry.bytes, self._retry.timeout_sec)
            _require_content(url, entry.sha256, sha256_of(to))

        self._whole(url, fetch)

    def _whole(self, url: str, action: Callable[[], Result]) -> Result:
        """What ``action`` reads, tried again, with the way out in what it raises."""
        try:
            return with_retries(url, action, self._retry, self._cache.stopped)
        except FileNotFoundError as error:
            raise ValueError(f"{url} is missing, but the manifest lists it; {REMOTE_REPAIR}.") from error
        except DamagedError as error:
            raise ValueError(f"{error}; {REMOTE_REPAIR}.") from error


def _require_content(url: str, expected: str, found: str) -> None:
    if found != expected:
        raise DamagedError(f"{url} is damaged: the manifest says sha256 {expected}, the file has {found}")


def _allow_open_files(num_shards: int) -> None:
    """Make room for every shard to be mapped, which keeps its file open. Raises ValueError where there is none."""
    needed = num_shards + OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < needed:
        raise ValueError(
            f"{num_shards} shards need {needed} open files, but this system allows {hard}; raise `ulimit -n`, or "
            "encode with a larger data.samples_per_shard."
        )
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class FetchedAhead:
    """Mappings of wanted shards, made by daemon threads in the order in which they are wanted. For one user."""

    def __init__(self, fetch: Callable[[int], mmap.mmap], num_threads: int) -> None:
        self._fetch = fetch
        self._futures: dict[int, Future[mmap.mmap]] = {}
        self._queue: queue.SimpleQueue[tuple[int, Future[mmap.mmap]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: Sequence[int]) -> None:
        """From now on these; what others there are is let go, or not begun."""
        for shard in self._futures.keys() - set(shards):
            self._futures.pop(shard).cancel()
        for shard in shards:
            if shard not in self._futures:
                self._put(shard)

    def get(self, shard: int) -> mmap.mmap:
        """The mapping of a wanted shard, awaited. What failed ahead of need is tried again, then its error raised."""
        future = self._futures[shard]
        if future.done() and future.exception() is not None:
            self._put(shard)
        return self._futures[shard].result()

    def close(self) -> None:
        """Let everything go; threads end when what they are fetching has arrived or failed."""
        self.want([])
        for _ in self._threads:
            self._queue.put(None)

    def _put(self, shard: int) -> None:
        self._futures[shard] = Future()
        self._queue.put((shard, self._futures[shard]))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._serve(*item)
            del item  # or it would hold the mapping until the next one is wanted

    def _serve(self, shard: int, future: "Future[mmap.mmap]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._fetch(shard))
        except BaseException as error:  # raised where the shard is used
            future.set_exception(error)
