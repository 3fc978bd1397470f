"""Read wandb's offline files: a log of protocol buffers in LevelDB's record format."""

from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
FILE_HEADER = 7
RECORD_HEADER = 7  # crc (4), length (2), kind (1)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _contents(raw: bytes) -> Iterator[bytes]:
    """Yield the payloads of all records, joined where they extend over several blocks."""
    position, parts = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(raw):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:  # the end of a block is padding
            position += left
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        assert kind in (FULL, FIRST, MIDDLE, LAST), kind
        position += RECORD_HEADER
        parts += raw[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def _records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    for content in _contents(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        yield record


def offline_history(folder: Path) -> list[dict[str, str]]:
    """Return the history rows of the one offline run in ``folder/wandb``: names to values as JSON text."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return history_of(path)


def history_of(path: Path) -> list[dict[str, str]]:
    """Return the history rows of one file: names to values as JSON text."""
    rows = []
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(item.key or ".".join(item.nested_key)): item.value_json for item in items})
    return rows


def metric_axes(path: Path) -> dict[str, str]:
    """Return the x axis of each defined metric or pattern, empty where it has none."""
    metrics = [r.metric for r in _records(path) if r.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def run_group(path: Path) -> str:
    """Return the group of a file's run."""
    return next(r.run.run_group for r in _records(path) if r.WhichOneof("record_type") == "run")
