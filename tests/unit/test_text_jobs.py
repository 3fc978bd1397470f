"""Jobs take prompts: an image depends on its own, numbers record all of them, and mistakes are sentences."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import InProcess, json_lines, prepared_by
from PIL import Image
from small_text_encoders import write_small_clip, write_whole_clip
from test_evaluation_commands import Interrupted, interrupted, kept  # noqa: F401  # a fixture among them
from text_runs import encoder_words, training_words, write_text_run

from core.draws import Philox, Purpose
from core.records import canonical_hash
from data.manifest import Manifest
from data.text_encoders import CLIPText
from evaluation.grid import columns_of, grid_of, lines_of

SAMPLE = ["sample", "checkpoint=run", "runtime=cpu", "weights=model", "sampler.steps=3"]
GUIDED = ["diffusion/guidance=classifier_free", "guidance.scale=4"]
FEW = ["evaluation.num_images=20", "evaluation.batch_size=5", "evaluation.features.epochs=1"]
EVALUATE = ["evaluate", *SAMPLE[1:], *FEW]
THREE, SEVEN, ONE = "a drawing of a three", "digit seven", "the number of one"
LONG = "a number of numbers of numbers of numbers"  # more tokens than the small CLIP takes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that drew and measured samples, its shards, and a run of classes."""
    folder = tmp_path_factory.mktemp("trained")
    scored = f"evaluation.metric.clip_score.folder={write_whole_clip(folder / 'whole')}"
    often = ["sample_every=4", "evaluate_every=4", "evaluation.metrics=[frechet,clip_score]", scored]
    write_text_run(folder, *often, *FEW, f"condition.prompts=[{THREE},{SEVEN}]")
    classes = [word for word in training_words(folder) if "text" not in word and "block" not in word]
    prepared_by(*classes, "run_dir=classes", cwd=folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, with the classifier that its evaluation trained."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "cache", tmp_path / "cache")
    (tmp_path / "whole").symlink_to(trained / "whole")
    return tmp_path / "run"


def sampled(in_process: InProcess, *words: str) -> np.ndarray:
    """Return the images [num_images, H, W, C] that a command writes."""
    in_process(*SAMPLE, *words, "out=x")
    with np.load("x.npz") as file:
        found: np.ndarray = file["arr_0"]
    return found


def test_image_i_depends_on_seed_i_and_prompt_alone(run: Path, in_process: InProcess) -> None:
    among = sampled(in_process, f"prompts=[{THREE},{SEVEN}]", "num_images=5", *GUIDED)
    for second, batch_size in ((SEVEN, 2), (ONE, 1)):
        words = [f"prompts=[{THREE},{second}]", f"batch_size={batch_size}", "num_images=3"]
        alone = sampled(in_process, *words, *GUIDED)
        np.testing.assert_array_equal(alone[[0, 2]], among[[0, 2]])
        assert np.array_equal(alone[1], among[1]) == (second == SEVEN)
    one = sampled(in_process, f"prompts={THREE!r}", "num_images=5", *GUIDED)
    np.testing.assert_array_equal(one[[0, 2, 4]], among[[0, 2, 4]])
    assert not np.array_equal(one[3], among[3])
    assert not np.array_equal(sampled(in_process, f"prompts={THREE!r}", "seed=1", "num_images=1", *GUIDED)[0], one[0])


def test_a_negative_prompt_takes_the_place_of_the_empty_caption(run: Path, in_process: InProcess) -> None:
    words = [f"prompts=[{THREE}]", "num_images=2", *GUIDED]
    plain = sampled(in_process, *words)
    np.testing.assert_array_equal(sampled(in_process, *words, "negative_prompt=''"), plain)
    assert not np.array_equal(sampled(in_process, *words, f"negative_prompt={SEVEN!r}"), plain)
    away_from_itself = sampled(in_process, *words, f"negative_prompt={THREE!r}")
    unguided = sampled(in_process, *words[:2])
    assert np.abs(away_from_itself.astype(int) - unguided).max() <= 1  # rounding


def test_prompts_are_written_beside_the_images_and_above_them(run: Path, in_process: InProcess) -> None:
    prompts = [{"prompt": f"../{THREE}"}, {"prompt": "ünïcode\n\t${x}"}]
    Path("list.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    in_process(*SAMPLE, "prompts=list.jsonl", "num_images=4")
    (picture,) = (run / "samples").glob("*-ddpm3-*.png")
    assert picture.name.startswith("step_00000004-model-seed0-ddpm3-_a_drawing_of_a_three-")
    assert json_lines(picture.with_suffix(".jsonl")) == prompts * 2
    with np.load(picture.with_suffix(".npz")) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    shown, below = np.asarray(Image.open(picture)), grid_of(images, 2)
    np.testing.assert_array_equal(shown[-len(below) :], below)
    captions = shown[: -len(below)]
    assert len(captions) > 20
    assert captions.min() == 0
    again = sampled(in_process, f"prompts={picture.with_suffix('.jsonl')}", "num_images=4")
    np.testing.assert_array_equal(again, images)


def test_two_lists_of_prompts_with_one_beginning_have_two_files(run: Path, in_process: InProcess) -> None:
    for more in ("prompts=['a',x]", "prompts=['a',y]", "prompts=a", "prompts=A"):
        in_process(*SAMPLE, more, "num_images=2")
    assert len(list((run / "samples").glob("*.npz"))) == 4


def test_prompts_with_classes_give_labels_and_truncated_ones_a_note(run: Path, in_process: InProcess) -> None:
    Path("list.jsonl").write_text(f'{{"prompt": "{THREE}", "class": 3}}\n\n{{"prompt": "{LONG}", "class": 7}}\n')
    shown = in_process(*SAMPLE, "prompts=list.jsonl", "num_images=3", "out=x")
    assert "note: 1 of 2 prompts is longer than the 12 tokens of clip_text, and truncated." in shown
    with np.load("x.npz") as file:
        assert file["arr_1"].tolist() == [3, 7, 3]
    assert json_lines(Path("x.jsonl"))[1] == {"prompt": LONG, "class": 7}
    assert "note:" not in in_process(*SAMPLE, f"prompts=[{THREE}]", "num_images=1", "out=x")
    unused = "note: 1 of 2 prompts get no image; set num_images=2 for one of each."
    assert unused in in_process(*SAMPLE, f"prompts=[{THREE},{SEVEN}]", "num_images=1", "out=x")


def test_a_grid_has_a_caption_once_or_above_each_column_or_above_each_image() -> None:
    images = np.zeros((6, 8, 8, 3), np.uint8)
    plain = grid_of(images, 3)
    for captions, strips in ((["a"] * 6, 1), (["a", "b", "c"] * 2, 1), (["a", "b", "c", "d", "e", "f"], 2)):
        grid = grid_of(images, 3, captions)
        assert grid.shape[1:] == plain.shape[1:]
        white = (grid[:, 40] == 255).all(axis=1)
        black_rows = np.flatnonzero(~white)
        assert len(black_rows) == 128
        gaps = np.flatnonzero(np.diff(black_rows) > 1)
        assert (black_rows[gaps[0] + 1] - black_rows[gaps[0]] > 10) == (strips == 2)
        assert (grid[: black_rows[0]] == 0).any()
    gray = grid_of(images[..., :1], 3, ["a", "b", "c"] * 2)
    np.testing.assert_array_equal(gray, grid_of(images, 3, ["a", "b", "c"] * 2)[..., 0])
    assert columns_of(6, 3) == 3


def test_a_caption_is_broken_into_lines_and_shortened() -> None:
    assert lines_of("a drawing \n of\ta three", 64) == ["a drawing", "of a three"]
    assert lines_of("", 64) == []
    lines = lines_of(LONG * 9, 64)
    assert len(lines) == 4
    assert lines[-1].endswith("\u2026")
    assert "".join(lines_of("x" * 20, 64)) == "x" * 20
    assert lines_of("ab", 1) == ["a", "b"]


def test_training_draws_and_measures_prompts(trained: Path) -> None:
    (record,) = json_lines(trained / "run/evaluations.jsonl")
    prompts = [THREE, SEVEN]
    assert record["captions_hash"] == canonical_hash(prompts * 10, spaced=True)
    assert 0 < record["clip_score"] < 100
    grid = np.asarray(Image.open(trained / "run/samples/step_00000004.png"))
    assert grid.shape[1] == 2 * 66 + 2
    assert (grid[:30] == 0).any()
    assert grid.shape[0] > 8 * 66 + 2 + 20


def test_an_evaluation_of_drawn_captions_scores_and_records_them(run: Path, in_process: InProcess) -> None:
    texts = [THREE, SEVEN, ONE]
    content = {"annotations": [{"caption": f"{text}\n ", "image_id": 1} for text in texts]}
    Path("coco.json").write_text(json.dumps(content))
    words = ["prompts=coco.json", "evaluation.labels=random", "evaluation.metric.clip_score.folder=whole"]
    files = ["evaluation/image_file=npz", "evaluation.image_file.path=x.npz"]
    in_process(*EVALUATE, *words, *files, "metrics=[frechet,clip_score]")
    philox = Philox(0)
    drawn = [texts[philox.at(index, Purpose.SAMPLE_LABEL).integers(3)] for index in range(20)]
    assert [line["prompt"] for line in json_lines(Path("x.jsonl"))] == drawn
    in_process(*EVALUATE, *words[::2], "prompts=coco.json", "metrics=[clip_score]")
    one, other = json_lines(run / "evaluations.jsonl")[1:]
    assert one["captions_hash"] == canonical_hash(drawn, spaced=True) != other["captions_hash"]
    assert one["labels"] == "random"
    assert 0 < one["clip_score"] != other["clip_score"]
    assert "negative_prompt" not in one["guidance"]


def test_a_killed_evaluation_continues_only_with_its_prompts(
    run: Path,
    in_process: InProcess,
    interrupted: Interrupted,  # noqa: F811
) -> None:
    words = [*EVALUATE, *GUIDED, "metrics=[frechet]"]
    mine = [f"prompts=[{THREE},{SEVEN}]", f"negative_prompt={ONE!r}"]

    def evaluate(chunks: int, *more: str) -> bool:
        """Return whether an evaluation needs at most so many chunks; one that needs more is interrupted."""
        interrupted.left = 1 + chunks  # the reference's images are seen first
        try:
            in_process(*words, *more)
        except (KeyboardInterrupt, AssertionError):
            return False
        return True

    assert not evaluate(2, *mine)
    assert list(kept(run).values()) == [2]
    assert not evaluate(2, mine[0])
    assert not evaluate(2, f"prompts=[{THREE},{ONE}]", mine[1])
    assert not evaluate(2, mine[0], "negative_prompt=x")
    assert list(kept(run).values()) == [2] * 4
    assert evaluate(2, *mine)
    assert json_lines(run / "evaluations.jsonl")[-1]["guidance"]["negative_prompt"] == ONE


def test_bits_per_dimension_are_those_of_the_shards_with_their_captions(
    run: Path, trained: Path, in_process: InProcess
) -> None:
    words = [f"data.shards={trained / 'shards'}", "evaluation.num_images=2", "metrics=[nll]"]
    in_process(*EVALUATE, *words)
    *_, record = json_lines(run / "evaluations.jsonl")
    assert np.isfinite(record["bits_per_dimension"])
    assert record["likelihood_data_hash"] == Manifest.load(str(trained / "shards")).hash


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["labels=[3]"], 'is conditioned on texts; give prompts="..." or prompts=FILE.txt.'),
        (["checkpoint=classes", "prompts=x"], "prompts is given, but classes/checkpoints/step_00000004 is conditioned"),
        (["checkpoint=classes", "negative_prompt=x"], "negative_prompt is given, but classes/checkpoints/step_0000000"),
        (["negative_prompt=x"], "negative_prompt is given, but only guidance by the null condition uses it; set diff"),
        (["prompts=3"], "prompts is 3, which is not a text; put it into quotation marks: '\"3\"'."),
        (["prompts=[x,3]"], "prompts has 3, which is not a text; put it into quotation marks."),
        (["prompts=''"], "prompts='' has no text; give at least one."),
        (["prompts=[]"], "prompts=[] has no text; give at least one."),
        (["prompts=none.txt"], "There is no file none.txt of prompts; give another, or a text."),
        (["prompts=empty.txt"], "prompts='empty.txt' has no text; give at least one."),
        (["prompts=bytes.txt"], "bytes.txt is not text in UTF-8: byte 1 is wrong."),
        (["prompts=second.jsonl"], "second.jsonl line 3 is damaged: it is not JSON ("),
        (["prompts=key.jsonl"], 'key.jsonl line 1 is damaged: it is not {"prompt": text}.'),
        (["prompts=class.jsonl"], "class.jsonl line 1 is damaged: its class is 'x', not a whole number."),
        (["prompts=large.jsonl"], "large.jsonl has the class 9999999999999999999, but classes are"),
        (["prompts=half.jsonl"], "half.jsonl has 'a\\ud800', which is not text in Unicode; correct it."),
        (["prompts=coco.json"], "coco.json is damaged: it has no list 'annotations', as COCO's captions have."),
        (["prompts=x", *encoder_words(Path("nowhere"))], "There is no nowhere/config.json; copy config.json"),
        (
            ["prompts=x", *encoder_words(Path("clip")), "text_encoder.layer=penultimate"],
            "layer penultimate, fp32),",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, trained: Path, tmp_path: Path, in_process: InProcess
) -> None:
    for name in ("run", "classes", "clip"):
        (tmp_path / name).symlink_to(trained / name)
    for name, content in {
        "empty.txt": b" \n",
        "bytes.txt": b"a\xff",
        "second.jsonl": b'{"prompt": "x"}\n\n{"prompt"',
        "key.jsonl": b'{"text": "x"}',
        "class.jsonl": b'{"prompt": "x", "class": "x"}',
        "large.jsonl": b'{"prompt": "x", "class": 9999999999999999999}',
        "half.jsonl": b'{"prompt": "a\\ud800"}',
        "coco.json": b'{"images": []}',
    }.items():
        Path(name).write_bytes(content)
    assert sentence in in_process(*SAMPLE, *words, expect=2)


def test_another_text_encoder_than_the_shards_is_refused_with_both_hashes(
    trained: Path, tmp_path: Path, in_process: InProcess
) -> None:
    other = encoder_words(write_small_clip(tmp_path / "other", intermediate_size=24))
    (tmp_path / "run").symlink_to(trained / "run")
    theirs, ours = (CLIPText(str(path)).spec().revision for path in (tmp_path / "other", trained / "clip"))
    assert theirs != ours
    sentence = f"text_encoder is clip_text {theirs} (12 tokens of 16, layer last, fp32), but the captions were"
    for words in ([*SAMPLE, "prompts=x"], [*training_words(trained), "run_dir=new"]):
        shown = in_process(*words, *other, expect=2)
        assert sentence in shown
        assert f"for clip_text {ours} (" in shown
    none = ["data/text_encoder=none", "run_dir=new"]  # without it, that of the shards is taken
    assert "whose text encoder is not given" in in_process(*training_words(trained), *none, expect=2)
    assert not Path("new/config.yaml").exists()


def test_shards_and_prompts_that_text_cannot_be_trained_with_are_refused(
    trained: Path, digits: Path, in_process: InProcess
) -> None:
    words = [*training_words(trained), *encoder_words(trained / "clip"), "run_dir=new"]
    assert "needs token ids of captions, but" in in_process(*words, f"data.shards={digits}", expect=2)
    assert "which a run's config cannot hold" in in_process(*words, f"condition.prompts=[{LONG * 30}]", expect=2)
    assert "condition.prompts is [3], but input should be" in in_process(*words, "condition.prompts=[3]", expect=2)
    none = in_process(*words, "condition.prompts=[]", "sample_every=4", expect=2)
    assert "in training as condition.prompts=[...]." in none
    assert not Path("new/config.yaml").exists()
