"""Classify files that a source finds but does not read, and say what to do about them."""

from typing import NamedTuple

from PIL import Image

HEAD_BYTES = 32  # enough to recognize a format


class LeftOut(NamedTuple):
    """A file of a source that gives no row."""

    source_id: str
    reason: str
    is_image: bool  # whether it should have given a row; it then counts as an unreadable image


class Kind(NamedTuple):
    """A kind of file, recognized by its suffix."""

    plural: str
    way_out: str  # may contain {place} as the user gave it, {folder} of the files, and {first} of them
    suffixes: tuple[str, ...]
    reason: str = ""  # why such a file among images is left out; empty: it is not reported
    is_image: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_UNREAD_IMAGES = Kind(
    "images in formats that are not read",
    "convert to JPEG or PNG",
    _words(
        ".heic .heif .hif .avif .avifs .jxl .jxr .wdp .hdp .svg .svgz .exr .hdr .dcm .xcf .kra .bpg .flif .jng .mng "
        ".raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .3fr .dcr .kdc .mrw .x3f .erf .mef "
        ".mos .iiq .rwl .gpr"
    ),
    "its format is not read; convert it to JPEG or PNG",
    is_image=True,
)
_POINTERS = Kind(
    "names of files that lie elsewhere",
    "fetch what they name",
    (".icloud", ".dvc"),
    "it only names a file that lies elsewhere; fetch that",
    is_image=True,
)
_VIDEOS = Kind(
    "videos",
    "write their frames as images",
    _words(".mp4 .m4v .mov .avi .mkv .webm .wmv .3gp .mts .m2ts"),
    "a video is not read",
)
COMPRESSED_TARS = Kind(
    "compressed tar files",
    "a compressed tar cannot be read at random, so unpack it to .tar (gunzip, unxz, unzstd) or to class folders",
    _words(".tar.gz .tgz .tar.bz2 .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .tar.z"),
    "it is a compressed tar file, which is not read; unpack it",
)
_ARCHIVES = Kind(
    "compressed files",
    "unpack first",
    _words(".gz .bz2 .xz .zst .lz4 .z .7z .rar"),
    "it is compressed and not read; unpack it",
)
_ZIPS = Kind(
    "zip files",
    "read one with data/source=image_folder data.source.root={first}, or unpack",
    (".zip",),
    "a zip file in a folder is not read; unpack it, or give it as data.source.root",
)
_TARS = Kind(
    "tar files",
    "read with data/source=image_tars data.source.tars={place}, or unpack to class folders where there are no labels",
    (".tar",),
    "a tar file among images is not read; unpack it",
)
_PARQUET = Kind("parquet files", "read with data/source=parquet data.source.root={place}", (".parquet",))
_ARROW = Kind("Arrow files", "read with data/source=saved_dataset data.source.root={folder}", (".arrow",))
_ARRAYS = Kind("arrays", "put into tars with labels for data/source=latent_tars", (".npy",))
_DATABASES = Kind(
    "files of other libraries",
    "write the images into class folders",
    _words(".tfrecord .tfrecords .lmdb .mdb .rec .h5 .hdf5 .hdf .beton .npz .mat .pkl .pt .mds"),
)
# The first match counts: ``.tar.gz`` must come before ``.gz``.
_KINDS = (
    _UNREAD_IMAGES,
    _POINTERS,
    _VIDEOS,
    COMPRESSED_TARS,
    _ARCHIVES,
    _ZIPS,
    _TARS,
    _PARQUET,
    _ARROW,
    _ARRAYS,
    _DATABASES,
)
# Files that often lie next to images; they are ignored without being opened.
_COMPANIONS = frozenset(
    _words(
        ".txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .css .js .py .pyc .ipynb .sh "
        ".bat .m .log .lock .xmp .aae .thm .srt .vtt .caption .md5 .sha1 .sha256 .sum .ckpt .safetensors .bin .idx "
        ".onnx .doc .docx .xls .xlsx .ppt .pptx .rtf .tex .bib .url .lnk .exe .dll .sqlite .db .lst .names"
    )
)
# Files that operating systems and editors leave behind. Names that begin with a dot are litter too.
_LITTER = frozenset(
    ["thumbs.db", "desktop.ini", "__macosx", "lost+found", "$recycle.bin", "system volume information", "__pycache__"]
)
_LFS_START = b"version https://git-lfs.github.com/spec/"
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_IMAGE_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"mif1", b"msf1", b"avif", b"avis")


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the image formats that the installed Pillow reads."""
    Image.init()
    return tuple(Image.registered_extensions())


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by a system; such files are not reported."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in name.split("/"))


def is_placeholder(name: str) -> bool:
    """Return whether a hidden file is a placeholder for one that iCloud stores, as ``.photo.jpg.icloud``."""
    folder, _, base = name.rpartition("/")
    return base.startswith(".") and base.endswith(".icloud") and not (folder and is_litter(folder))


def kind_of(name: str) -> Kind | None:
    """Return the kind of a file with one of the suffixes that image sources do not read; None for any other name."""
    lower = name.lower()
    return next((kind for kind in _KINDS if lower.endswith(kind.suffixes)), None)


def is_companion(name: str) -> bool:
    """Return whether a file is a text, a table or the like, which often lies next to images."""
    return f".{name.rpartition('.')[2].lower()}" in _COMPANIONS


def image_format(head: bytes) -> str | None:
    """Return the format of an image by its first bytes, or None for anything else."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return "HEIF or AVIF"
    return next((title for start, title in _IMAGE_STARTS.items() if head.startswith(start)), None)


def compression(head: bytes) -> str | None:
    """Return the compression of a file by its first bytes, or None where it is not compressed."""
    return next((title for start, title in _COMPRESSIONS.items() if head.startswith(start)), None)


def is_lfs_pointer(content: bytes) -> bool:
    """Return whether these bytes are a Git LFS pointer, which only names the real file."""
    return content.startswith(_LFS_START)


LFS_REASON = "is a Git LFS pointer and not the file itself; run `git lfs pull` where it was cloned"
