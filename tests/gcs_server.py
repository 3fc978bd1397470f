"""A local server with the part of Google Cloud Storage's JSON API that gcsfs uses, and faults on demand.

Objects are kept in memory and appear complete or not at all, as in the real store. A rewrite takes one call.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec.config
from local_server import LocalHandler, LocalServer

BUCKET = "shards"
STARTED = "2026-01-01T00:00:00.000000Z"  # objects have a generation, not a clock


@dataclass
class Object:
    """An object; every write gives it a new generation."""

    content: bytes
    generation: int

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        """Return the object as the API describes it."""
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "bucket": bucket,
            "name": name,
            "generation": str(self.generation),
            "metageneration": "1",
            "size": str(len(self.content)),
            "md5Hash": self.md5,
            "timeCreated": STARTED,
            "updated": STARTED,
        }

    @property
    def md5(self) -> str:
        return base64.b64encode(hashlib.md5(self.content).digest()).decode()


@dataclass
class Upload:
    """An unfinished resumable upload."""

    bucket: str
    name: str
    match: int | None
    content: bytearray = field(default_factory=bytearray)


class GcsServer(LocalServer):
    """A server of ``buckets``, which map names to objects; tests put objects there, or upload them as clients do.

    ``calls`` counts requests as "VERB NAME", with NAME the object's name after its last slash ("" of a list), and
    ``faults`` maps the same words to the faults of the next such requests, in turn. Verbs: download, describe, list,
    upload (each request of a resumable one too), delete, rewrite, move. Faults: any HTTP status ("503", "429", "403"),
    "hang" (longer than any test waits), "cut" (the connection closes half-way), "flip" (one byte is changed).
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.buckets: dict[str, dict[str, Object]] = {BUCKET: {}}
        self.uploads: dict[str, Upload] = {}  # that are not complete yet
        self.num_uploads = 0
        self.lock = threading.Lock()
        self._generation = 0

    def put(self, bucket: str, name: str, content: bytes) -> Object:
        """Write an object."""
        self._generation += 1
        written = self.buckets[bucket][name] = Object(content, self._generation)
        return written


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Yield a running server with one empty bucket; GCS clients of this process and its children use it keylessly."""
    with GcsServer().running() as server:
        settings = {"STORAGE_EMULATOR_HOST": server.url, "FSSPEC_GS_TOKEN": "anon"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        fsspec.config.conf["gs"] = {"token": "anon"}  # fsspec read the environment when it was imported
        try:
            yield server
        finally:
            del fsspec.config.conf["gs"]
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def upload(server: GcsServer, folder: Path, prefix: str) -> str:
    """Put a folder's files, at any depth, into the bucket; returns its URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.put(BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"gs://{BUCKET}/{prefix}"


@dataclass
class _Answer:
    """The answer to one request."""

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


class _RefusedError(Exception):
    """A request is refused with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _HangError(Exception):
    """A request ends without an answer."""


class _Handler(LocalHandler, http.server.BaseHTTPRequestHandler):
    owner: GcsServer
    query: dict[str, str]
    body: bytes

    def do_GET(self) -> None:
        self._serve(
            {
                r"/storage/v1/b/([^/]+)": self._bucket,
                r"/storage/v1/b/([^/]+)/o": self._list,
                r"/storage/v1/b/([^/]+)/o/([^/]+)": self._describe,
                r"/download/storage/v1/b/([^/]+)/o/([^/]+)": self._download,
            }
        )

    def do_POST(self) -> None:
        self._serve(
            {
                r"/upload/storage/v1/b/([^/]+)/o": self._upload,
                r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)": self._rewrite,
                r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)": self._move,
            }
        )

    def do_PUT(self) -> None:
        self.do_POST()

    def do_DELETE(self) -> None:
        self._serve(
            {
                r"/storage/v1/b/([^/]+)/o/([^/]+)": self._delete,
                r"/upload/storage/v1/b/([^/]+)/o": self._cancel,
            }
        )

    def _serve(self, routes: dict[str, Callable[..., _Answer]]) -> None:
        address = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._send(self._routed(routes, address.path))
        except _RefusedError as refusal:
            error = {"code": refusal.status, "message": str(refusal)}
            self._send(_Answer(refusal.status, json.dumps({"error": error}).encode()))
        except _HangError:
            self.owner.released.wait(60)
            self.close_connection = True

    def _routed(self, routes: dict[str, Callable[..., _Answer]], path: str) -> _Answer:
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, path):
                with self.owner.lock:
                    return route(*(urllib.parse.unquote(part) for part in found.groups()))
        raise _RefusedError(501, f"{self.command} {path} is not served here")

    def _meet_fault(self, verb: str, name: str) -> str | None:
        """Count the request; raise its fault, or return a fault that changes the content."""
        fault = self.owner.met(f"{verb} {name.rsplit('/', 1)[-1]}")
        if fault is not None and fault.isdigit():
            raise _RefusedError(int(fault), "injected")
        if fault == "hang":
            raise _HangError
        return fault

    def _object(self, bucket: str, name: str) -> Object:
        found = self._objects(bucket).get(name)
        if found is None:
            raise _RefusedError(404, f"No such object: {bucket}/{name}")
        return found

    def _objects(self, bucket: str) -> dict[str, Object]:
        if bucket not in self.owner.buckets:
            raise _RefusedError(404, f"The bucket {bucket} does not exist")
        return self.owner.buckets[bucket]

    def _bucket(self, bucket: str) -> _Answer:
        self._objects(bucket)
        return _json({"kind": "storage#bucket", "id": bucket, "name": bucket})

    def _list(self, bucket: str) -> _Answer:
        """Return a page of objects and, with a delimiter, of prefixes that stand for all objects below them."""
        self._meet_fault("list", "")
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        entries: dict[str, dict[str, Any] | None] = {}  # None is a prefix
        for name, found in sorted(self._objects(bucket).items()):
            if name.startswith(prefix) and name >= start and (not end or name < end):
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries[prefix + head + cut if cut else name] = None if cut else found.resource(bucket, name)
        after = [name for name in entries if name > self.query.get("pageToken", "")]
        page = after[: int(self.query.get("maxResults", 1000))]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        if items := [entries[name] for name in page if entries[name] is not None]:
            answer["items"] = items
        if prefixes := [name for name in page if entries[name] is None]:
            answer["prefixes"] = prefixes
        if len(page) < len(after):
            answer["nextPageToken"] = page[-1]
        return _json(answer)

    def _describe(self, bucket: str, name: str) -> _Answer:
        if self.query.get("alt") == "media":
            return self._download(bucket, name)
        self._meet_fault("describe", name)
        return _json(self._object(bucket, name).resource(bucket, name))

    def _download(self, bucket: str, name: str) -> _Answer:
        fault = self._meet_fault("download", name)
        found = self._object(bucket, name)
        if self.query.get("generation", str(found.generation)) != str(found.generation):
            raise _RefusedError(404, f"No such object: {bucket}/{name}#{self.query['generation']}")
        content = found.content
        if fault == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {"X-Goog-Hash": f"md5={found.md5}", "X-Goog-Generation": str(found.generation)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return _Answer(200, content, headers, cut=fault == "cut")
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            raise _RefusedError(416, "The requested range cannot be satisfied")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return _Answer(206, content[first : last + 1], headers, cut=fault == "cut")

    def _upload(self, bucket: str) -> _Answer:
        kind = self.query.get("uploadType")
        if "upload_id" in self.query:
            return self._take_chunk(self.query["upload_id"])
        if kind == "multipart":
            name, content = _multipart(self.headers["Content-Type"], self.body)
        elif kind == "media":
            name, content = self.query["name"], self.body
        else:
            name = self.query.get("name") or json.loads(self.body)["name"]
        self._meet_fault("upload", name)
        self._require_generation(bucket, name, self._match())
        if kind == "resumable":
            self.owner.num_uploads += 1
            key = str(self.owner.num_uploads)
            self.owner.uploads[key] = Upload(bucket, name, self._match())
            place = f"{self.owner.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return _Answer(200, b"", {"Location": place})
        return _json(self.owner.put(bucket, name, content).resource(bucket, name))

    def _take_chunk(self, key: str) -> _Answer:
        """Append a chunk of a resumable upload; the last chunk makes the object appear."""
        upload = self.owner.uploads[key]
        self._meet_fault("upload", upload.name)
        asked = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert asked is not None
        if asked[1] is not None and int(asked[1]) != len(upload.content):
            raise _RefusedError(400, f"a chunk starts at {asked[1]}, but {len(upload.content)} bytes are here")
        upload.content += self.body
        if asked[2] != str(len(upload.content)):
            received = {"Range": f"bytes=0-{len(upload.content) - 1}"} if upload.content else {}
            return _Answer(308, b"", received)
        self._require_generation(upload.bucket, upload.name, upload.match)
        del self.owner.uploads[key]
        written = self.owner.put(upload.bucket, upload.name, bytes(upload.content))
        return _json(written.resource(upload.bucket, upload.name))

    def _cancel(self, bucket: str) -> _Answer:
        del self.owner.uploads[self.query["upload_id"]]
        return _Answer(499, b"")

    def _delete(self, bucket: str, name: str) -> _Answer:
        self._meet_fault("delete", name)
        self._object(bucket, name)
        del self._objects(bucket)[name]
        return _Answer(204, b"")

    def _rewrite(self, bucket: str, name: str, to_bucket: str, to_name: str) -> _Answer:
        self._meet_fault("rewrite", name)
        found = self._object(bucket, name)
        self._require_generation(to_bucket, to_name, self._match())
        copy = self.owner.put(to_bucket, to_name, found.content)
        answer = {"kind": "storage#rewriteResponse", "done": True, "objectSize": str(len(found.content))}
        return _json({**answer, "resource": copy.resource(to_bucket, to_name)})

    def _move(self, bucket: str, name: str, to_name: str) -> _Answer:
        self._meet_fault("move", name)
        found = self._object(bucket, name)
        self._require_generation(bucket, to_name, self._match())
        del self._objects(bucket)[name]
        return _json(self.owner.put(bucket, to_name, found.content).resource(bucket, to_name))

    def _match(self) -> int | None:
        asked = self.query.get("ifGenerationMatch")
        return None if asked is None else int(asked)

    def _require_generation(self, bucket: str, name: str, match: int | None) -> None:
        """Refuse a write whose required generation differs; 0 requires that the object does not exist yet."""
        present = self._objects(bucket).get(name)
        if match is not None and match != (present.generation if present else 0):
            raise _RefusedError(412, "At least one of the pre-conditions you specified did not hold.")

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content[: len(answer.content) // 2] if answer.cut else answer.content)
        if answer.cut:
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True


def _json(answer: dict[str, Any]) -> _Answer:
    return _Answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json; charset=UTF-8"})


def _multipart(content_type: str, body: bytes) -> tuple[str, bytes]:
    """Return the name and the content of an upload in one request: a part of JSON, then a part of bytes."""
    asked = re.search(r"boundary=['\"]?([^'\";]+)", content_type)
    assert asked is not None
    edge = f"--{asked[1]}".encode()
    newline = b"\r\n" if body.startswith(edge + b"\r\n") else b"\n"
    _, described, rest = body.split(edge, 2)
    rest = rest[: rest.rindex(newline + edge)]
    described, content = (part.split(2 * newline, 1)[1] for part in (described, rest))
    return json.loads(described)["name"], content
