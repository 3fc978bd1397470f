"""Read the files of a folder of shards from a local disk, or from a URL through a cache on a local disk."""

import hashlib
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
from data.mapped_file import MappedFile
from data.shard_index import IndexFile

Result = TypeVar("Result")

OTHER_OPEN_FILES = 512  # files that a process may have open in addition to its shards
REPAIR = "run the same `ditscale encode` again, which rewrites only what is damaged"
REMOTE_REPAIR = "copy it there again from the folder of `ditscale encode`, which `ditscale verify repair=true` repairs"


class ShardFiles(Protocol):
    """A reader of the files of a manifest. Its methods raise ValueError that names a missing or damaged file."""

    manifest: Manifest
    files: list[ShardEntry]  # the shards and, behind them, the file of each shard's embeddings, if there are any
    repair: str  # what to do about a damaged file
    keeps_all: bool  # whether all shards are always local, so that `expect` is unnecessary

    def read(self, file: IndexFile) -> bytes:
        """Return the content of an index of the shards, which has the hash that the manifest states."""
        ...

    def map(self, file: int) -> MappedFile:
        """Return the bytes of one of ``files``, of an expected shard, mapped read-only; wait until they are local."""
        ...

    def use_embeddings(self) -> None:
        """Treat the file of a shard's embeddings as a part of the shard from now on, and check it as the shard is."""
        ...

    def map_captions(self) -> MappedFile:
        """Return the bytes of the captions, which have the hash that the manifest states, mapped read-only."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards that are needed now and next, in this order; all others may be evicted."""
        ...

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """Raise ValueError where that many shards cannot be local at the same time; another order may need fewer."""
        ...

    def close(self) -> None:
        """Stop the background threads."""
        ...


class LocalShardFiles:
    """Shards in a local folder; the size and, with ``verify_checksums``, the hash of each is checked at the start."""

    keeps_all = True
    repair = REPAIR

    def __init__(self, folder: Path, verify_checksums: bool) -> None:
        self.manifest = Manifest.load(folder)
        self.files = [*self.manifest.shards, *self.manifest.embeddings]
        self._folder, self._verify, self._uses_embeddings = folder, verify_checksums, False
        self._by_position = _allow_open_files(len(self.files))
        self._check(self.manifest.shards)

    def read(self, file: IndexFile) -> bytes:
        """Return the content of an index of the shards."""
        try:
            with remedied(REPAIR):
                content = read_regular(self._path(file.name), file.max_bytes)
        except OSError as error:
            raise self._unreadable(file.name, error) from error
        self._require_hash(file.name, file.sha256, hashlib.sha256(content).hexdigest())
        return content

    def map(self, file: int) -> MappedFile:
        """Return the bytes of one of ``files``, mapped read-only."""
        with self._open(self.files[file], verify=False) as opened:
            return MappedFile.of(opened.fileno(), self._by_position)

    def use_embeddings(self) -> None:
        """Check the file of each shard's embeddings as the shards are checked at the start."""
        if not self._uses_embeddings:
            self._check(self.manifest.embeddings)
            self._uses_embeddings = True

    def map_captions(self) -> MappedFile:
        """Return the bytes of the captions, mapped read-only; their hash is always checked."""
        assert self.manifest.captions is not None, "these shards have no captions"
        with self._open(self.manifest.captions.entry, verify=True) as file:
            return MappedFile.of(file.fileno(), by_position=True)

    def expect(self, shards: Sequence[int]) -> None:
        """Do nothing: all shards are local."""

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """Do nothing: there is room for all shards."""

    def close(self) -> None:
        """Do nothing: there are no background threads."""

    def _check(self, files: Sequence[ShardEntry]) -> None:
        sizes = {} if self._verify else _sizes_of_files(self._folder)
        for file in files:
            if sizes.get(file.name) != file.bytes:  # or else it is a file of the folder itself, of the right size
                self._open(file, self._verify).close()

    def _path(self, name: str) -> Path:
        return inside(self._folder, name, str(self._folder / MANIFEST_NAME))

    def _open(self, shard: ShardEntry, verify: bool) -> BufferedReader:
        """Return a shard's open file after checking its size and, with ``verify``, its hash."""
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
        found = "" if size > shard.bytes else f", {sha256_of(self._path(shard.name))} found"  # a larger may be endless
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
    """Shards behind a URL, and a `Cache` into which ``num_threads`` threads prefetch them.

    A fetched shard is checked against the manifest's SHA-256. With ``verify_checksums``, so is a copy that the cache
    already has, when this process first uses it.
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
        self.files = [*self.manifest.shards, *self.manifest.embeddings]
        cache.by_position = _allow_open_files(len(self.files))
        self._ahead = FetchedAhead(self._mapped, num_threads)
        self._captions_bytes = 0  # of the cache, once they are mapped
        self._uses_embeddings, self._expected = False, list[int]()

    def read(self, file: IndexFile) -> bytes:
        """Return the content of an index of the shards."""
        url = join(self._url, file.name)

        def read() -> bytes:
            content = read_limited(url, file.max_bytes, self._retry.timeout_sec)
            _require_content(url, file.sha256, hashlib.sha256(content).hexdigest())
            return content

        return self._whole(url, read)

    def require_room(self, num_shards: int, can_be_fewer: bool) -> None:
        """Raise ValueError where the cache cannot hold that many shards."""
        sizes = [sum(self.files[file].bytes for file in self._of_shard(shard)) for shard in range(self._num_shards)]
        largest = sorted(sizes, reverse=True)[:num_shards]
        if (needed := sum(largest)) > self._cache.limit_bytes - self._captions_bytes:
            fewer = "choose data/order=windowed with fewer data.order.shards_per_window"
            raise ValueError(
                f"data.cache_bytes is {self._cache.limit_bytes}, but the {len(largest)} shards of {self._url} that "
                f"data.order needs at a time have {needed} bytes{self._beside()}; raise data.cache_bytes, or "
                f"{fewer if can_be_fewer else 'encode with a smaller data.samples_per_shard'}."
            )

    def map(self, file: int) -> MappedFile:
        """Return the bytes of one of ``files``, mapped read-only; wait until they are local."""
        return self._ahead.get(file)

    def use_embeddings(self) -> None:
        """Fetch the file of a shard's embeddings with the shard from now on."""
        if not self._uses_embeddings:
            self._uses_embeddings = True
            self.expect(self._expected)

    def map_captions(self) -> MappedFile:
        """Return the bytes of the captions, mapped read-only; they stay in the cache. Raises ValueError for no room."""
        assert self.manifest.captions is not None, "these shards have no captions"
        entry = self.manifest.captions.entry
        if entry.bytes > self._cache.limit_bytes:
            raise ValueError(
                f"data.cache_bytes is {self._cache.limit_bytes}, but the captions of {self._url} have {entry.bytes} "
                "bytes; raise data.cache_bytes."
            )
        file = CachedFile(entry.sha256, entry.bytes)
        mapped = self._cache.map(file, lambda path: self._fetch(entry, path), verify=True)
        self._captions_bytes = entry.bytes
        return mapped

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards that are needed now and next, and start to fetch the missing ones."""
        self._expected = list(shards)
        files = [file for shard in shards for file in self._of_shard(shard)]
        self._cache.needed = frozenset(self.files[file].sha256 for file in files)
        self._ahead.want(files)

    def close(self) -> None:
        """Stop the background threads."""
        self._cache.stopped.set()
        self._ahead.close()

    @property
    def _num_shards(self) -> int:
        return len(self.manifest.shards)

    def _of_shard(self, shard: int) -> list[int]:
        """Return the files that belong to a shard."""
        return [shard, self._num_shards + shard] if self._uses_embeddings else [shard]

    def _beside(self) -> str:
        return f" beside {self._captions_bytes} of captions" if self._captions_bytes else ""

    def _mapped(self, file: int) -> MappedFile:
        entry = self.files[file]
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
        """Return what ``action`` reads, with retries; errors say how to repair the file."""
        try:
            return with_retries(url, action, self._retry, self._cache.stopped)
        except FileNotFoundError as error:
            raise ValueError(f"{url} is missing, but the manifest lists it; {REMOTE_REPAIR}.") from error
        except DamagedError as error:
            raise ValueError(f"{error}; {REMOTE_REPAIR}.") from error


def _sizes_of_files(folder: Path) -> dict[str, int]:
    """Return the bytes of each readable file of a folder, without links. This is faster than to open thousands."""
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    return {file.name: file.stat().st_size for file in files if os.access(file.path, os.R_OK)}


def _require_content(url: str, expected: str, found: str) -> None:
    if found != expected:
        raise DamagedError(f"{url} is damaged: the manifest says sha256 {expected}, the file has {found}")


def _allow_open_files(num_files: int) -> bool:
    """Raise the limit on open files so that all files of shards can stay mapped; return whether each may be open twice.

    Raises ValueError where the system does not allow so many.
    """
    needed = num_files + OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < needed:
        raise ValueError(
            f"{num_files} files of shards need {needed} open files, but this system allows {hard}; raise `ulimit -n`, "
            "or encode with a larger data.samples_per_shard."
        )
    twice = needed + num_files
    allows_twice = hard == resource.RLIM_INFINITY or twice <= hard
    wanted = twice if allows_twice else needed
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return allows_twice


class FetchedAhead:
    """Mappings of wanted shards, made by daemon threads in the order of the request. It serves a single caller."""

    def __init__(self, fetch: Callable[[int], MappedFile], num_threads: int) -> None:
        self._fetch = fetch
        self._futures: dict[int, Future[MappedFile]] = {}
        self._queue: queue.SimpleQueue[tuple[int, Future[MappedFile]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these shards next; release or cancel all others."""
        for shard in self._futures.keys() - set(shards):
            self._futures.pop(shard).cancel()
        for shard in shards:
            if shard not in self._futures:
                self._put(shard)

    def get(self, shard: int) -> MappedFile:
        """Wait for the mapping of a wanted shard and return it.

        A prefetch that failed is retried once; then its error is raised.
        """
        future = self._futures[shard]
        if future.done() and future.exception() is not None:
            self._put(shard)
        return self._futures[shard].result()

    def close(self) -> None:
        """Release all shards; each thread ends when its current fetch has succeeded or failed."""
        self.want([])
        for _ in self._threads:
            self._queue.put(None)

    def _put(self, shard: int) -> None:
        self._futures[shard] = Future()
        self._queue.put((shard, self._futures[shard]))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._serve(*item)
            del item  # otherwise it would keep the mapping alive until the next request

    def _serve(self, shard: int, future: "Future[MappedFile]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._fetch(shard))
        except BaseException as error:  # `get` raises it where the shard is used
            future.set_exception(error)
