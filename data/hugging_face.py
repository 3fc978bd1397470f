"""Define sources of images in Hugging Face's formats: parquet files as on its hub, and datasets saved to disk."""

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from core.reading import DamagedFileError
from core.records import canonical_hash
from data.captions import caption_texts
from data.files import Files, given
from data.images import UnreadableImageError
from data.named_files import named_files
from data.sources import Example, required_captions

Result = TypeVar("Result")

_ARROW_FILE = b"ARROW1"  # start of Arrow's file format; `save_to_disk` writes the stream format


class _Columns(NamedTuple):
    """The names of the columns that are read; None where there is none."""

    image: str
    label: str | None
    caption: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in self if name is not None]

    @property
    def settings(self) -> str:
        return "data.source.image_column and data.source.label_column" + (
            "" if self.caption is None else " and data.source.caption_column"
        )

    @property
    def identity(self) -> list[str | None]:
        """Return the part of a fingerprint, which is that of earlier versions where there are no captions."""
        return [self.image, self.label, *([] if self.caption is None else [self.caption])]


class ParquetImages:
    """A source of parquet files, local or at a URL, with a column of images ({bytes, path} or bytes) and one of labels.

    ``root`` is a folder, one file or a pattern (``data/train-*.parquet``). Row groups are decoded whole, so the encode
    job mixes images within runs of row groups, and this source caches the most recent ones, up to ``cache_bytes``.
    Without a ``label_column``, there is one class, named ``images``. A ``caption_column`` has texts or lists of them.
    Raises ValueError for damaged files, and for missing columns or packages.
    """

    name = "parquet"
    notes = ()

    def __init__(
        self,
        root: str | None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
        cache_bytes: int = 2 * 2**30,
    ) -> None:
        root, parquet = given(root, "root"), _pyarrow("parquet")
        self._files, self._names, self.left_out = named_files(root, ".parquet")
        self._columns = _Columns(image_column, label_column, caption_column)
        self._tables = [_sound(self._files, name, parquet.ParquetFile, self._files.open(name)) for name in self._names]
        self._groups = [
            (number, group) for number, table in enumerate(self._tables) for group in range(table.num_row_groups)
        ]
        self.block_sizes = [self._tables[n].metadata.row_group(group).num_rows for n, group in self._groups]
        self._ends = list(accumulate(self.block_sizes))
        self.class_names = _classes(self._names, [table.schema_arrow for table in self._tables], self._columns)
        _require_rows(self._ends[-1] if self._ends else 0, self._names, root)
        self.fingerprint = _fingerprint(self._files, self._names, self._columns)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()  # a parquet reader is not safe to share between threads

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        block = bisect_right(self._ends, index)
        row = index - (self._ends[block] - self.block_sizes[block])
        table = self._block(block)
        return _example(f"row-{index:08d}", table, row, self._columns)

    def _block(self, block: int) -> Any:
        with self._lock:
            if block not in self._cache:
                number, group = self._groups[block]
                self._cache[block] = _sound(
                    self._files,
                    self._names[number],
                    lambda: self._tables[number].read_row_group(group, columns=self._columns.names),
                )
                while len(self._cache) > 1 and sum(table.nbytes for table in self._cache.values()) > self._cache_bytes:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(block)
            return self._cache[block]


class SavedDataset:
    """A source of a local folder that ``datasets.Dataset.save_to_disk`` wrote; its Arrow files are memory-mapped.

    Its columns are those of `ParquetImages`.
    Raises ValueError for damaged files, for missing columns or packages, and for a URL.
    """

    name = "saved dataset"
    block_sizes = None
    notes = ()

    def __init__(
        self,
        root: str | None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
    ) -> None:
        root, pyarrow = given(root, "root"), _pyarrow(None)
        files, names, self.left_out = named_files(root, ".arrow")
        if not files.is_near:
            raise ValueError(f"{root} is not local, but a saved dataset is memory-mapped; copy it, or use parquet.")
        self._columns = _Columns(image_column, label_column, caption_column)
        tables = [_sound(files, name, _mapped, files, name) for name in names]
        self.class_names = _classes(names, [table.schema for table in tables], self._columns)
        self._table = pyarrow.concat_tables([table.select(self._columns.names) for table in tables])
        _require_rows(self._table.num_rows, names, root)
        self.fingerprint = _fingerprint(files, names, self._columns)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Example:
        return _example(f"row-{index:08d}", self._table, index, self._columns)


def _mapped(files: Files, name: str) -> Any:
    """Return the table of an Arrow file in the stream format or the file format."""
    pyarrow, ipc = _pyarrow(None), _pyarrow("ipc")
    is_file = files.read(name, 0, len(_ARROW_FILE)) == _ARROW_FILE
    mapped = pyarrow.memory_map(files.local_path(name))
    return (ipc.open_file if is_file else ipc.open_stream)(mapped).read_all()


def _sound(files: Files, name: str, action: Callable[..., Result], *arguments: Any) -> Result:
    """Return what ``action`` returns. Raises ValueError that names the file where pyarrow cannot read it."""
    arrow_error = _pyarrow("lib").ArrowException
    try:
        return action(*arguments)
    except (arrow_error, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{files.place}/{name} cannot be read ({reason}); fetch or make it again.") from error


def _example(source_id: str, table: Any, row: int, columns: _Columns) -> Example:
    image, label, caption = (None if name is None else table.column(name)[row].as_py() for name in columns)
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        path = image.get("path") if isinstance(image, dict) else None
        elsewhere = f", but the path {path!r}; write the data set with its images embedded" if path else ""
        raise UnreadableImageError(f"the row holds no bytes of an image{elsewhere}", source_id)
    if columns.label is None:
        label = 0
    if not isinstance(label, int):
        raise ValueError(f"{source_id} has the label {label!r}, but a label is a whole number.")
    return Example(source_id, content, label, _captions(source_id, caption, columns))


def _captions(source_id: str, caption: Any, columns: _Columns) -> tuple[str, ...]:
    if columns.caption is None:
        return ()
    texts = [each for each in caption if each is not None] if isinstance(caption, list) else caption
    try:
        return required_captions(caption_texts(texts, f"the column {columns.caption!r}"), source_id)
    except DamagedFileError as error:
        raise UnreadableImageError(str(error).rstrip("."), source_id) from error


def _pyarrow(module: str | None) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError as error:
        raise ValueError(f"Parquet and Arrow files need pyarrow ({error}); run `pip install pyarrow`.") from error


def _require_rows(number: int, names: Sequence[str], root: str) -> None:
    if number == 0:
        raise ValueError(f"The {len(names)} files of {root} have 0 rows; is it the right folder?")


def _classes(names: Sequence[str], schemas: Sequence[Any], columns: _Columns) -> list[str]:
    """Return the classes of all files.

    Raises ValueError where a column is missing or holds no images or no texts, or where the files name different
    classes.
    """
    for name, schema in zip(names, schemas, strict=True):
        _require_columns(schema, columns, name)
        _require_images(schema, columns.image, name)
        if columns.caption is not None:
            _require_texts(schema, columns.caption, name)
    if columns.label is None:
        return ["images"]
    first = _class_names(schemas[0], columns.label)
    for name, schema in zip(names, schemas, strict=True):
        if (found := _described_classes(schema, columns.label)) not in (None, first):
            raise ValueError(
                f"{name} names {len(found or [])} classes that differ from the {len(first)} of {names[0]}; read them "
                "as two data sets."
            )
    return first


def _require_columns(schema: Any, columns: _Columns, name: str) -> None:
    for column in columns.names:
        if column not in schema.names:
            raise ValueError(f"{name} has no column {column!r}, but {', '.join(schema.names)}; set {columns.settings}.")


def _require_texts(schema: Any, column: str, name: str) -> None:
    """Raise ValueError where a column holds neither texts nor lists of texts."""
    types, kind = _pyarrow("types"), schema.field(column).type
    inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    if not (types.is_string(inner) or types.is_large_string(inner)):
        raise ValueError(
            f"{name} has values of type {kind} in the column {column!r}, but captions are texts or lists of texts; set "
            "data.source.caption_column."
        )


def _require_images(schema: Any, column: str, name: str) -> None:
    """Raise ValueError where a column holds paths or pixels instead of the bytes of image files."""
    types, kind = _pyarrow("types"), schema.field(column).type
    has_bytes = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if types.is_string(kind) or types.is_large_string(kind):
        raise ValueError(
            f"{name} has paths in the column {column!r} ({kind}) and not the images; write the data set with its "
            "images embedded, or give the folder that holds them to data/source=image_folder."
        )
    if not has_bytes and "binary" not in str(kind):
        raise ValueError(
            f"{name} has values of type {kind} in the column {column!r}, but images are read as bytes or as "
            "{bytes, path}; set data.source.image_column, or write the data set with its images as such."
        )


def _class_names(schema: Any, label_column: str) -> list[str]:
    """Return the class names in the schema's Hugging Face metadata. Raises ValueError where there are none."""
    names = _described_classes(schema, label_column)
    if not names:
        raise ValueError(
            f"The files do not name the classes of the column {label_column!r} (no ClassLabel in their Hugging Face "
            "metadata); save them with datasets' ClassLabel feature."
        )
    return names


def _described_classes(schema: Any, label_column: str) -> list[str] | None:
    try:
        described = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label_column]
        return [str(name) for name in described["names"]]
    except (TypeError, KeyError, ValueError):
        return None


def _fingerprint(files: Files, names: list[str], columns: _Columns) -> str:
    listing = [(name, files.sizes[name]) for name in names]
    return canonical_hash([listing, columns.identity], spaced=True)
