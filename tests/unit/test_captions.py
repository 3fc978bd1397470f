"""Sources give captions: files beside images, tars, columns, templates; what has none is set aside and named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import InProcess, json_lines
from pictures import encoded, make_image_folder, photo
from test_tar_members import tar_of

from data.captions import Captioned, CaptionLines, Captions, CocoCaptions, Templates
from data.hugging_face import ParquetImages, SavedDataset
from data.image_folder import ImageFolder
from data.images import UnreadableImageError
from data.sources import MAX_CAPTION, DigitsSource, Source
from data.tars import ImageTars, LatentTars

PICTURE = encoded(photo(0), "PNG")


def captions_of(source: Source) -> dict[str, tuple[str, ...] | str]:
    """Return the captions of each image, or the reason why it is set aside."""
    found: dict[str, tuple[str, ...] | str] = {}
    for index in range(len(source)):
        try:
            example = source[index]
            found[example.source_id] = example.captions
        except UnreadableImageError as error:
            found[error.source_id] = error.reason
    return found


def lines_file(path: Path, *lines: Any) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def coco_file(path: Path, images: Any, annotations: Any) -> str:
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    return ImageFolder(str(make_image_folder(tmp_path / "images", per_class=2)))


def test_lines_give_captions_by_path_or_else_by_file_name_and_the_rest_are_set_aside(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/4.png", "b/5.png", "b/6.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    file = lines_file(
        tmp_path / "captions.jsonl",
        {"file_name": "a/1.png", "text": "  one\n\tdog "},
        {"file_name": "2.png", "caption": "two", "license": 3},
        {"file_name": "train/a/3.png", "captions": ["three", " ", "\u0007three\u0000again"]},
        {"file_name": "b/4.png", "caption": None},
        {"file_name": ".\\b\\5.png", "text": "five"},
        "",
        {"file_name": "b/5.png", "text": "another five"},
    )
    source = Captioned(ImageFolder(str(tmp_path)), CaptionLines(file))
    assert captions_of(source) == {
        "a/1.png": ("one dog",),
        "a/2.png": ("two",),
        "a/3.png": ("three", "three again"),
        "b/4.png": "it has no caption",
        "b/5.png": ("five", "another five"),
        "b/6.png": "it has no caption",
    }
    assert source.class_names == ["a", "b"]


def test_a_file_name_that_fits_two_images_is_refused(tmp_path: Path, folder: ImageFolder) -> None:
    captions = CaptionLines(lines_file(tmp_path / "captions.jsonl", {"file_name": "000.JPEG", "text": "an ant"}))
    with pytest.raises(ValueError, match=r"000.JPEG, but ant/000.JPEG and bee/000.JPEG of image folder have the same"):
        Captioned(folder, captions)
    exact = {"file_name": "ant/000.JPEG", "text": "an ant"}  # of which other folders' images must get nothing
    captions = CaptionLines(lines_file(tmp_path / "captions.jsonl", exact))
    assert captions_of(Captioned(folder, captions))["bee/000.JPEG"] == "it has no caption"


def test_coco_gives_several_captions_of_an_image(tmp_path: Path, folder: ImageFolder) -> None:
    images = [{"id": 7, "file_name": "bee/001.JPEG"}, {"id": 8, "file_name": "ant/000.JPEG"}]
    annotations = [{"image_id": 7, "id": 1, "caption": "A bee."}, {"image_id": 7, "id": 2, "caption": "Another."}]
    source = Captioned(folder, CocoCaptions(coco_file(tmp_path / "coco.json", images, annotations)))
    found = captions_of(source)
    assert found["bee/001.JPEG"] == ("A bee.", "Another.")
    assert found["ant/000.JPEG"] == "it has no caption"


def test_templates_make_captions_of_labels() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    source = Captioned(DigitsSource(), Templates(["a drawing of a {word}", "digit {name}"], words))
    example = next(source[index] for index in range(100) if source[index].label == 7)
    assert example.captions == ("a drawing of a seven", "digit 7")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Templates([]), "0 templates"),
        (
            lambda: Templates(["a {word}"]),
            r"A template is 'a \{word\}', but \{word\} must be \{name\}; give captions.w",
        ),
        (lambda: Templates(["a {name.__class__}"]), r"\{name.__class__\} must be \{name\}"),
        (lambda: Captioned(DigitsSource(), Templates(["{word}"], ["zero"])), "1 words, but digits has 10 classes"),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"captions.jsonl line 1 is damaged: it is not JSON"),
        ([{"file_name": "a", "text": "b"}, "[" * 10**5], r"line 2 is damaged: its brackets are nested"),
        (["[1]"], r"line 1 is damaged: it holds a list where"),
        ([{"text": "b"}], r"line 1 is damaged: its file_name is None"),
        ([{"file_name": "a"}], r"line 1 is damaged: it has none of 'captions', 'caption', 'text'"),
        ([{"file_name": "a", "captions": ["b", 3]}], r"line 1 is damaged: its caption is 3, not a text"),
        ([{"file_name": "zebra.png", "text": "b"}], r"None of the 6 images of image folder, the first .* ant/000.JPEG"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, folder: ImageFolder, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captioned(folder, CaptionLines(lines_file(tmp_path / "captions.jsonl", *lines)))


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ({}, [], "it has no list 'images'"),
        ([3], [], r"images\[0\] is not an object"),
        ([{"id": "7", "file_name": "a"}], [], r"images\[0\] is damaged: its id is '7', not a whole number"),
        ([{"id": 7}], [], r"images\[0\] is damaged: its file_name is None"),
        (
            [{"id": 7, "file_name": "a"}],
            [{"image_id": 8, "caption": "b"}],
            r"annotations\[0\] .* no image with the id 8",
        ),
        ([{"id": 7, "file_name": "a"}], [{"image_id": 7}], r"annotations\[0\] is damaged: its caption is None"),
    ],
)
def test_a_damaged_coco_file_is_named(tmp_path: Path, images: Any, annotations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoCaptions(coco_file(tmp_path / "coco.json", images, annotations))


def test_a_file_of_captions_that_is_missing_or_of_no_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"captions.file is missing; give it"):
        CaptionLines(None)
    with pytest.raises(ValueError, match=r"There is no .*absent.jsonl; give the file"):
        CaptionLines(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"is a folder, but it must be a file"):
        CocoCaptions(str(tmp_path))
    captions = CaptionLines(lines_file(tmp_path / "captions.jsonl", {"file_name": "digit-0001", "text": "a"}))
    with pytest.raises(ValueError, match=r"but those of digits have none; use it with data/source=image_folder"):
        Captioned(DigitsSource(), captions)


def test_the_fingerprint_changes_with_any_caption(tmp_path: Path, folder: ImageFolder) -> None:
    def fingerprint(captions: Captions) -> str:
        return Captioned(folder, captions).fingerprint

    line = {"file_name": "ant/000.JPEG", "text": "an ant"}
    one = fingerprint(CaptionLines(lines_file(tmp_path / "one.jsonl", line)))
    again = fingerprint(CaptionLines(lines_file(tmp_path / "two.jsonl", line)))
    other = fingerprint(CaptionLines(lines_file(tmp_path / "one.jsonl", {**line, "text": "the ant"})))
    templates = [fingerprint(Templates(["a {name}"])), fingerprint(Templates(["the {name}"]))]
    assert one == again
    assert len({folder.fingerprint, one, other, *templates}) == 5


def test_a_caption_that_cannot_be_stored_sets_its_image_aside(tmp_path: Path, folder: ImageFolder) -> None:
    lines = [
        {"file_name": "ant/000.JPEG", "text": "x" * MAX_CAPTION},
        {"file_name": "ant/001.JPEG", "text": "x" * (MAX_CAPTION + 1)},
        {"file_name": "bee/000.JPEG", "text": "half \ud800"},
    ]
    found = captions_of(Captioned(folder, CaptionLines(lines_file(tmp_path / "captions.jsonl", *lines))))
    assert found["ant/000.JPEG"] == ("x" * MAX_CAPTION,)
    assert found["ant/001.JPEG"] == f"a caption of it has {MAX_CAPTION + 1} characters, but at most 16384 are stored"
    assert found["bee/000.JPEG"] == "a caption of it has a character that UTF-8 does not have"


def tar_as_of_img2dataset(path: Path) -> str:
    """Write five samples with a ``.json`` and a ``.txt`` and no ``.cls``; the last four have faults."""
    members: dict[str, bytes | tarfile.TarInfo] = {}
    for number, caption in enumerate(["a red dog", "", None, "absent", "without its image"]):
        if number < 4:
            members[f"{number:09d}.jpg"] = PICTURE
        if caption != "absent":
            members[f"{number:09d}.json"] = json.dumps({"caption": caption, "key": f"{number:09d}"}).encode()
            members[f"{number:09d}.txt"] = (caption or "").encode()
    return tar_of(path, members)


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_tars_of_img2dataset_have_captions_and_one_class(tmp_path: Path, kind: Any) -> None:
    place = tar_as_of_img2dataset(tmp_path / "00000.tar")
    source = ImageTars(place, caption=kind)
    assert source.class_names == ["images"]
    assert captions_of(source) == {
        "00000.tar/000000000": ("a red dog",),
        "00000.tar/000000001": "it has no caption",
        "00000.tar/000000002": "it has no caption",
    }
    assert source[0][1:3] == (PICTURE, 0)
    assert [tuple(entry) for entry in source.left_out] == [
        ("00000.tar/000000003", f"it has no .{kind}, which should be its caption", True),
        (f"00000.tar/000000004.{kind}", "it is a caption without its image", True),
    ]
    other = ImageTars(place, caption="json" if kind == "txt" else "txt")
    assert source.fingerprint != other.fingerprint


def test_captions_in_tars_that_cannot_be_read_set_their_images_aside(tmp_path: Path) -> None:
    texts = {"a": b"\xff\xfe", "b": b"x" * 2**21, "c": "\ufeffsound".encode()}
    jsons = {"a": b"{", "b": b'{"caption": 3}', "c": b'{"caption": ["one", "two"]}', "d": b"[]"}
    for kind, contents in (("txt", texts), ("json", jsons)):
        members: dict[str, bytes | tarfile.TarInfo] = {}
        for key, content in contents.items():
            members |= {f"{key}.png": PICTURE, f"{key}.{kind}": content, f"{key}.cls": b"9"}
        tar_of(tmp_path / f"{kind}.tar", members)
    assert captions_of(ImageTars(str(tmp_path / "txt.tar"), caption="txt")) == {
        "txt.tar/a": "its .txt is not text in UTF-8: byte 0 is wrong",
        "txt.tar/b": "its .txt has 2097152 bytes, more than 1048576",
        "txt.tar/c": ("sound",),
    }
    found = captions_of(ImageTars(str(tmp_path / "json.tar"), caption="json"))
    assert str(found["json.tar/a"]).startswith("its .json is damaged: it is not JSON")
    assert found["json.tar/b"] == "its .json is damaged: its caption is 3, not a text"
    assert found["json.tar/c"] == ("one", "two")
    assert found["json.tar/d"] == "it has no caption"


def test_latents_in_tars_may_have_captions(tmp_path: Path) -> None:
    np.save(file := io.BytesIO(), np.zeros((4, 2, 2), np.float32))
    place = tar_of(tmp_path / "a.tar", {"a.npy": file.getvalue(), "a.txt": b"an array"})
    assert captions_of(LatentTars(place, caption="txt")) == {"a.tar/a": ("an array",)}


@pytest.mark.parametrize("labelled", [False, True])
def test_a_column_has_texts_or_lists_of_them_and_labels_are_optional(tmp_path: Path, labelled: bool) -> None:
    texts: dict[str, list[Any]] = {"text": ["one", None, "three"], "texts": [["one", "uno"], [], ["three", None]]}
    columns = {"image": [PICTURE] * 3, "label": [0, 1, 0], **texts}
    features = datasets.Features(
        {
            "image": datasets.Value("binary"),
            "label": datasets.ClassLabel(names=["ant", "bee"]),
            "text": datasets.Value("string"),
            "texts": datasets.Sequence(datasets.Value("string")),
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet/a.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    label = "label" if labelled else None
    for kind, place in ((ParquetImages, "parquet"), (SavedDataset, "saved")):
        one = kind(str(tmp_path / place), label_column=label, caption_column="text")
        several = kind(str(tmp_path / place), label_column=label, caption_column="texts")
        assert list(captions_of(one).values()) == [("one",), "it has no caption", ("three",)]
        assert list(captions_of(several).values()) == [("one", "uno"), "it has no caption", ("three",)]
        assert one.class_names == (["ant", "bee"] if labelled else ["images"])
        assert one[0].label == 0
        assert len({one.fingerprint, several.fingerprint, kind(str(tmp_path / place)).fingerprint}) == 3
        with pytest.raises(ValueError, match=r"values of type .* in the column 'image', but captions are texts"):
            kind(str(tmp_path / place), caption_column="image")
        with pytest.raises(
            ValueError, match=r"no column 'prompt', but image, .*label_column and data.source.caption_c"
        ):
            kind(str(tmp_path / place), caption_column="prompt")


def test_images_without_a_caption_are_counted_and_named_by_the_command(tmp_path: Path, in_process: InProcess) -> None:
    root = make_image_folder(tmp_path / "images", per_class=4)
    lines = [{"file_name": f"{name}/{number:03d}.JPEG", "text": name} for name in ("ant", "bee") for number in range(4)]
    file = lines_file(root / "captions.jsonl", *lines)
    words = ["encode", "data=folder", f"data.source.root={root}", "data.name=animals", "data.image_size=32"]
    words += ["model/autoencoder=identity", "data.shards=shards", "data/captions=lines", f"captions.file={file}"]
    shown = in_process(*words, expect=2)
    assert "4 of 12 images cannot be read, the last for 'it has no caption'" in shown
    assert "8 samples of 3 classes in 1 shards" in in_process(*words, "max_skipped_fraction=0.5")
    skipped = json_lines(tmp_path / "shards/skipped.jsonl")
    assert sorted(line["source_id"] for line in skipped) == [f"cat/{number:03d}.JPEG" for number in range(4)]
    assert {line["reason"] for line in skipped} == {"it has no caption"}
