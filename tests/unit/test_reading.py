"""Untrusted files, names and records are read safely, or refused in one sentence that names them."""

import hashlib
import json
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.atomic import append_line, atomic_folder, write_bytes
from core.names import UnsafeNameError, inside, plain_name, sha256_name, tree_inside
from core.reading import (
    DamagedFileError,
    open_regular,
    read_regular,
    read_text,
    require_own_file,
    require_regular,
    sha256_of,
)
from core.records import canonical_hash, check, parse_json, read_record, seal


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "link to a device", "link to itself"])
def test_what_is_no_regular_file_is_refused_at_once_and_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.path.relpath(path))
    found: list[BaseException] = []

    def read() -> None:
        for action in (open_regular, read_regular, read_text, sha256_of, require_regular):
            try:
                action(path)
            except DamagedFileError as error:
                found.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert len(found) == 5
    assert all(str(error).startswith(f"{path} is a ") for error in found)


def test_a_file_larger_than_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedFileError, match=f"sparse has {2**40} bytes, but at most 100 are read"):
        read_regular(path, 100)


def test_bytes_that_are_no_text_name_their_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"ab\xff")
    with pytest.raises(DamagedFileError, match=r"text is not text in UTF-8: byte 2 is 255"):
        read_text(tmp_path / "text")


BAD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "a\nb",
    "a\0b",
    "x" * 256,
    None,
    7,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_only_plain_names_become_paths(tmp_path: Path, name: object) -> None:
    with pytest.raises(UnsafeNameError, match="not a plain file name"):
        inside(tmp_path, name, "manifest.json")
    assert plain_name("shard-000000.tar", "manifest.json") == "shard-000000.tar"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "", None])
def test_a_name_with_folders_stays_below_its_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(UnsafeNameError, match="leads out of its folder"):
        tree_inside(tmp_path, name, "gs://bucket/run")
    assert tree_inside(tmp_path, "samples/step_1.png", "x") == tmp_path / "samples/step_1.png"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to("/etc")
    (folder / "near").symlink_to("file")
    (folder / "file").write_text("x")
    (folder / "circle").symlink_to("circle")
    with pytest.raises(UnsafeNameError, match="is a link out of"):
        inside(folder, "circle", "manifest.json")
    for name in ("out", "out/passwd"):
        with pytest.raises(UnsafeNameError, match="is a link out of"):
            tree_inside(folder, name, "manifest.json")
    assert inside(folder, "near", "manifest.json").read_text() == "x"


@pytest.mark.parametrize("value", ["../../victim/data", "ab" * 31, "AB" * 32, "g" * 64, None, 3])
def test_a_hash_that_names_a_file_is_64_hexadecimal_digits(value: object) -> None:
    with pytest.raises(UnsafeNameError, match="64 hexadecimal digits"):
        sha256_name(value, "manifest.json")


@dataclass
class Sample:
    name: str
    count: int
    pair: tuple[int, int]


RECORD = {"name": "x", "count": 3, "pair": [1, 2]}


def test_every_flipped_bit_of_a_sealed_record_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    whole = json.dumps(seal(RECORD), indent=1).encode()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = str(read_record(path, Sample))
        except DamagedFileError as error:
            found = str(error)
        assert found == str(Sample("x", 3, (1, 2))) or found.startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "junk",
        "{",
        "[" * 10**6,
        '{"a":' * 10**5,
        "1" * 10**5,
        '{"a": NaN}',
        '{"a": 1e999}',
        "\ud800",
        "\x00",
    ],
)
def test_junk_is_damage_with_the_files_name_and_no_traceback(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFileError, match=r"record\.json is damaged"):
        read_record(path, Sample)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": "3"}, "count is '3', but"),
        ({"count": None}, "count is None, but"),
        ({"pair": [1]}, "it has no pair.1"),
        ({"name": ["x"]}, "name is"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(seal({**RECORD, **change})))
    with pytest.raises(DamagedFileError, match=reason):
        read_record(path, Sample)
    missing = {key: value for key, value in RECORD.items() if key != "count"}
    path.write_text(json.dumps(seal(missing)))
    with pytest.raises(DamagedFileError, match="it has no count"):
        read_record(path, Sample)


def test_deep_values_that_json_can_hold_are_refused_by_the_schema() -> None:
    deep = parse_json("[" * 500 + "]" * 500, "x")
    assert isinstance(deep, list)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"step": 1}', b'{"step": 1}\n{"step": 2}\n'),  # as an editor may leave it
        (b'{"step": 0}\n{"step": 1}', b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 0}\n{"ste', b'{"step": 0}\n{"step": 2}\n'),  # cut by a crash
        (b'{"ste', b'{"step": 2}\n'),
        (b"", b'{"step": 2}\n'),
        (b'{"a": "' + b"x" * 200_000, b'{"step": 2}\n'),
    ],
)
def test_an_append_keeps_every_whole_line_and_takes_a_cut_one_away(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    append_line(path, '{"step": 2}')
    assert path.read_bytes() == after


def test_an_append_to_something_else_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"notes of mine")
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl ends with a line that is not JSON"):
        append_line(path, "{}")
    assert path.read_bytes() == b"notes of mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedFileError, match="pipe is a named pipe"):
        append_line(tmp_path / "pipe", "{}")


def test_files_of_a_folder_are_as_readable_as_their_neighbours(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as aside:
        os.close(os.open(aside / "secret", os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "neighbour").touch()
    assert (tmp_path / "new/secret").stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def test_a_file_takes_the_place_of_anything_but_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        write_bytes(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    (tmp_path / "folder").mkdir()
    with pytest.raises(DamagedFileError, match="folder is a folder, but a file of that name is written there; remove"):
        write_bytes(tmp_path / "folder", b"x")


def test_checked_values_stay_as_they_were_read() -> None:
    """Accept an integer for a float, and a name that is not UTF-8, without changing them."""

    @dataclass
    class Named:
        name: str
        scale: float

    content = {"name": "caf\udce9.jpg", "scale": 1}
    check(Named, content, "record.json")
    assert content == {"name": "caf\udce9.jpg", "scale": 1}
    with pytest.raises(DamagedFileError, match=r"record.json is damaged: scale is None, but"):
        check(Named, {**content, "scale": None}, "record.json")


def test_a_file_that_is_written_in_place_is_no_link(tmp_path: Path) -> None:
    """Refuse a link, since opening a lock truncates it, and a link would truncate another file."""
    (tmp_path / "mine").write_text("x")
    (tmp_path / "lock").symlink_to("mine")
    os.mkfifo(tmp_path / "pipe")
    require_own_file(tmp_path / "mine")
    require_own_file(tmp_path / "absent")
    for name, kind in (("lock", "a link"), ("pipe", "a named pipe")):
        with pytest.raises(DamagedFileError, match=f"{name} is {kind}, but it must be a file; remove it"):
            require_own_file(tmp_path / name)


def test_the_hash_of_values_is_that_of_their_text_as_earlier_versions_wrote_it() -> None:
    """Hash the dense text for seals, and the spaced text for identities of plans, sources and cached results."""
    content = {"b": [1.5, "é", None], "a": {"d": 1, "c": True}}
    dense = r'{"a":{"c":true,"d":1},"b":[1.5,"\u00e9",null]}'
    spaced = r'{"a": {"c": true, "d": 1}, "b": [1.5, "\u00e9", null]}'
    assert canonical_hash(content) == hashlib.sha256(dense.encode()).hexdigest()
    assert canonical_hash(content, spaced=True) == hashlib.sha256(spaced.encode()).hexdigest()
    assert canonical_hash(content, spaced=True, then=[b"x", b"y"]) == hashlib.sha256(f"{spaced}xy".encode()).hexdigest()
