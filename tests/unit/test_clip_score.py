"""The CLIP score is that of transformers' own CLIP, in chunks and over processes, and is refused without captions."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fast_hydra
import numpy as np
import pytest
import torch
from conftest import InProcess, silent_progress
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from small_text_encoders import write_small_clip, write_whole_clip
from test_evaluation import PixelFeatures, generator
from test_evaluation_commands import EVALUATE, run, train, trained  # noqa: F401  # two fixtures among them
from test_generation import OneOf
from test_metrics import collected, in_parallel
from test_report import record_of, write_run

from core.reading import sha256_of
from diffusion.samplers import Noise
from evaluation.chunks import ChunkStore
from evaluation.evaluate import Evaluator, MeasurementProtocol
from evaluation.features.clip import CLIPSimilarity, prepared
from evaluation.features.clip_folder import Preparation
from evaluation.features.extractor import Features
from evaluation.generate import Generator
from evaluation.metrics.clip_score import CLIPScore
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.statistics import FeatureStatistics
from evaluation.reference.reference import Reference
from launch.builders.metrics import build_metrics, require_metrics
from model.autoencoder import IdentityAutoencoder
from report.study import read_study
from runtime.accelerate import AccelerateRuntime

SIDES = 28  # pixels, of the small CLIP
CAPTIONS = ["a drawing of a three", "The digit  SEVEN", "", "a number a number and a number of a number of numbers"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_clip(tmp_path_factory.mktemp("clip"), SIDES)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def images_of(count: int, *shape: int) -> np.ndarray:
    """Return images of different brightness, since the network sees little else in noise."""
    random = np.random.default_rng(0)
    return (random.integers(0, 256, (count, *shape)) * random.random((count, 1, 1, shape[2]))).astype(np.uint8)


def captions_of(count: int) -> list[str]:
    return [CAPTIONS[index % len(CAPTIONS)] for index in range(count)]


def reference() -> Reference:
    statistics = FeatureStatistics.of(np.random.default_rng(0).normal(size=(9, 64)))
    return Reference("r", "h", statistics, None, num_vectors=0)


def expected(folder: Path, images: np.ndarray, captions: list[str]) -> np.ndarray:
    """Return the cosines that transformers' own model, tokenizer and image processor give, one by one."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = []
    for image, caption in zip(images, captions, strict=True):
        length = model.config.text_config.max_position_embeddings
        words = tokenizer([caption], truncation=True, max_length=length, return_tensors="pt")
        pixels = processor(Image.fromarray(image.squeeze()), return_tensors="pt")
        with torch.no_grad():
            logits = model(**words, **pixels).logits_per_image / model.logit_scale.exp()
        found.append(logits.item())
    return np.array(found)


@pytest.mark.parametrize("shape", [(40, 40, 3), (9, 9, 3), (28, 28, 1), (50, 33, 3), (31, 70, 1)])
@pytest.mark.parametrize("sizes", [{}, {"size": 32, "crop_size": 28}])
def test_images_are_prepared_as_transformers_does(copy: Path, shape: tuple[int, ...], sizes: dict[str, Any]) -> None:
    """Use images that grow and shrink, of any side, in color and gray, and the form of sizes in earlier files."""
    from transformers import CLIPImageProcessorPil

    preprocessor = copy / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({**json.loads(preprocessor.read_text()), **sizes}))
    theirs, images = CLIPImageProcessorPil.from_pretrained(copy), images_of(3, *shape)
    values = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    ours = prepared(images, Preparation(sizes.get("size", SIDES), SIDES, **values))
    for image, pixels in zip(images, ours, strict=True):
        found = theirs(Image.fromarray(image.squeeze()), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "the "])
def test_the_score_is_that_of_transformers(folder: Path, prefix: str) -> None:
    images, captions = images_of(24, 40, 40, 3), captions_of(24)
    cosines = expected(folder, images, [prefix + caption for caption in captions])
    assert cosines.min() < -0.01
    assert cosines.max() > 0.05
    for weight, batch_size in ((100.0, 4), (2.5, 100), (1.0, 1)):
        metric = CLIPScore(str(folder), weight=weight, prefix=prefix, batch_size=batch_size)
        metric.scorer.to(torch.device("xla", 0))  # it stays on the host, where float32 is float32
        scores = metric.scorer(images, captions)
        np.testing.assert_allclose(scores[:, 0], cosines, rtol=0, atol=1e-5)
        merged = collected(metric.collects, Features(scores, captioned=scores))[0]
        found = metric.compute(merged, reference(), CPU)
        assert found["clip_score"] == pytest.approx(weight * np.maximum(cosines, 0).mean(), abs=1e-5 * weight)


def test_captions_beyond_the_limit_are_truncated_and_counted_in_silence(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use captions of exactly the limit of 12 tokens, both ends among them, and of one more."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 12}')  # as the published ones have
    captions = ["a " * 10, "a " * 11, "a " * 500, "of"]
    images = images_of(4, 28, 28, 3)
    scores = CLIPScore(str(copy)).scorer(images, captions)
    assert "Token indices" not in caplog.text
    assert scores[:, 1].tolist() == [0, 1, 1, 0]
    np.testing.assert_allclose(scores[:, 0], expected(copy, images, captions), rtol=0, atol=1e-5)
    same = CLIPScore(str(copy)).scorer(images[:1].repeat(2, axis=0), captions[:2])
    np.testing.assert_allclose(same[0, 0], same[1, 0], rtol=0, atol=1e-6)


def test_the_end_of_a_caption_is_found_in_files_of_earlier_versions(copy: Path, folder: Path) -> None:
    """Use the id 2 for the end, which the published files have: the largest id of a caption is meant."""
    config = copy / "config.json"
    content = json.loads(config.read_text())
    content["text_config"]["eos_token_id"] = 2
    config.write_text(json.dumps(content))
    images, captions = images_of(4, 28, 28, 3), captions_of(4)
    np.testing.assert_array_equal(
        CLIPScore(str(copy)).scorer(images, captions), CLIPScore(str(folder)).scorer(images, captions)
    )


def test_weights_in_several_files_give_the_same_scores(copy: Path, folder: Path) -> None:
    from transformers import CLIPModel

    (copy / "model.safetensors").unlink()
    CLIPModel.from_pretrained(folder).save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    several, one = CLIPScore(str(copy)), CLIPScore(str(folder))
    images, captions = images_of(4, 28, 28, 3), captions_of(4)
    np.testing.assert_array_equal(several.scorer(images, captions), one.scorer(images, captions))
    assert several.settings["weights_sha256"] != one.settings["weights_sha256"]


@pytest.mark.parametrize("world", [1, 2, 7])
def test_scores_of_1_2_and_7_processes_are_those_of_all_images(world: int) -> None:
    """Use 100 images in chunks of 16, which are 7 chunks; with 40 images, 4 of 7 processes get none."""
    random = np.random.default_rng(0)
    for count in (100, 40):
        scores = np.stack([random.normal(size=count), random.integers(0, 2, count)], axis=1).astype(np.float32)
        for merged in collected(CLIPScore.collects, Features(scores, captioned=scores), world):
            assert (merged.count, merged.truncated) == (count, scores[:, 1].sum())
            assert merged.positive == pytest.approx(np.maximum(scores[:, 0].astype(np.float64), 0).sum(), rel=1e-12)


@dataclass(frozen=True)
class Noises:
    """A sampler that returns its noise, in images of different brightness."""

    name = "noises"

    def calls(self) -> int:
        return 1

    def __call__(self, denoiser: Any, objective: Any, noise: Noise, condition: Mapping[str, Any]) -> torch.Tensor:
        drawn = noise(0)
        return drawn / 4 + drawn[:, :, :1, :1]


def gray_generator() -> Generator:
    make = generator()
    return replace(
        make,
        sampler=Noises(),  # type: ignore[arg-type]
        spec=replace(make.spec, channels=1),
        autoencoder=IdentityAutoencoder(1),
    )


def evaluator_of(folder: Path, captions: list[str], **settings: Any) -> Evaluator:
    protocol = MeasurementProtocol({"name": "noises"}, {"name": "unguided"}, len(captions), 0, "fp32")
    metrics = {"frechet": FrechetDistance(), "clip_score": CLIPScore(str(folder), **settings)}
    return Evaluator(PixelFeatures(), reference(), protocol, 5, metrics, captions)


def test_an_evaluation_scores_image_i_against_caption_i_and_records_how(folder: Path) -> None:
    make, captions = gray_generator(), captions_of(13)
    record = evaluator_of(folder, captions, weight=1).evaluate(make, silent_progress)
    images = make.all_images(make.conditions.in_turn(13), 13, 13)
    assert record["clip_score"] == pytest.approx(np.maximum(expected(folder, images, captions), 0).mean(), abs=1e-5)
    assert record["truncated_captions"] == 3
    assert record["caption_scorer"] == folder.name
    settings = record["metrics"]["clip_score"]
    assert settings["weights_sha256"] == sha256_of(folder / "model.safetensors")
    assert (settings["weight"], settings["prefix"]) == (1, "")
    assert json.loads(json.dumps(record)) == record
    other = evaluator_of(folder, captions[::-1], weight=1).evaluate(make, silent_progress)
    assert other["clip_score"] != record["clip_score"]
    assert other["captions_hash"] != record["captions_hash"]
    assert other["frechet_distance"] == record["frechet_distance"]


def test_processes_score_each_image_against_its_own_caption(folder: Path) -> None:
    """Use 13 images in chunks of 5, which are 3 chunks for 2 processes."""
    captions = captions_of(13)
    alone = evaluator_of(folder, captions).evaluate(gray_generator(), silent_progress)

    def work(rank: int, gather: Any) -> dict[str, Any]:
        make = replace(gray_generator(), runtime=OneOf(rank, 2, gather))  # type: ignore[arg-type]
        return evaluator_of(folder, captions).evaluate(make, silent_progress)

    for record in in_parallel(2, work):
        assert record["clip_score"] == pytest.approx(alone["clip_score"], rel=1e-6)
        assert (record["truncated_captions"], record["captions_hash"]) == (3, alone["captions_hash"])


def test_processes_with_other_captions_are_refused_whatever_they_measure(folder: Path) -> None:
    def work(rank: int, gather: Any) -> str:
        make = replace(gray_generator(), runtime=OneOf(rank, 2, gather))  # type: ignore[arg-type]
        measure = evaluator_of(folder, CAPTIONS[rank:] + CAPTIONS[:rank])
        with pytest.raises(ValueError, match="processes of this job differ") as refused:
            replace(measure, metrics={"frechet": FrechetDistance()}).evaluate(make, silent_progress)
        return str(refused.value)

    assert all("captions_hash is" in sentence for sentence in in_parallel(2, work))


def test_a_reference_of_any_classes_fits_images_of_captions(folder: Path) -> None:
    of_seven = replace(reference(), num_classes=7)
    replace(evaluator_of(folder, captions_of(8)), reference=of_seven).require(8, 10)
    without = Evaluator(PixelFeatures(), of_seven, evaluator_of(folder, captions_of(8)).protocol, 5)
    with pytest.raises(ValueError, match="has classes: 7, but the generated images 10"):
        without.require(8, 10)


def test_a_killed_evaluation_continues_with_the_next_chunk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, left = CLIPSimilarity.__call__, [float("inf")]

    def counted(scorer: CLIPSimilarity, *arguments: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return seen(scorer, *arguments)

    monkeypatch.setattr(CLIPSimilarity, "__call__", counted)
    make, evaluator = gray_generator(), evaluator_of(folder, captions_of(18))
    whole = evaluator.evaluate(make, silent_progress)
    store = ChunkStore(tmp_path, {"features": evaluator.features_hash})
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(make, silent_progress, store)
    left[0] = 2  # of 4 chunks
    assert evaluator.evaluate(make, silent_progress, store) == whole
    assert left == [0]


def test_chunks_and_records_are_of_one_clip_and_one_list_of_captions(folder: Path, copy: Path, tmp_path: Path) -> None:
    captions = captions_of(8)
    ours = evaluator_of(folder, captions)
    moved = evaluator_of(copy, captions, batch_size=3, weight=1)  # the cosines are the same
    assert moved.features_hash == ours.features_hash
    assert moved.identity != ours.identity
    without = replace(ours, metrics={"frechet": FrechetDistance()})
    assert without.features_hash == PixelFeatures.hash
    assert "captions_hash" not in replace(without, captions=None).identity
    others = [evaluator_of(folder, captions[::-1]), evaluator_of(folder, captions, prefix="a ")]
    preprocessor = copy / "preprocessor_config.json"
    text = preprocessor.read_text()
    preprocessor.write_text(text.replace("0.41", "0.42"))
    others.append(evaluator_of(copy, captions))
    preprocessor.write_text(text)
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, copy / "model.safetensors")
    others.append(evaluator_of(copy, captions))
    tokens = copy / "vocab.json"
    shutil.copytree(folder, tmp_path / "tokens")
    words = json.loads(tokens.read_text())
    words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
    (tmp_path / "tokens/vocab.json").write_text(json.dumps(words))
    others.append(evaluator_of(folder, captions, tokenizer=str(tmp_path / "tokens")))
    assert len({ours.features_hash, without.features_hash, *(one.features_hash for one in others)}) == 7
    assert all(one.identity != ours.identity for one in others)


def sections(*words: str) -> dict[str, Any]:
    config = fast_hydra.composed("evaluate", *words)
    found: dict[str, Any] = OmegaConf.to_container(config.evaluation.metric, resolve=True)  # type: ignore[assignment]
    return found


def test_the_command_line_names_the_folder(folder: Path) -> None:
    words = [f"evaluation.metric.clip_score.folder={folder}", "evaluation.metric.clip_score.prefix='A photo depicts '"]
    found = sections(*words, "evaluation.metric.clip_score.weight=2.5")
    require_metrics(found, ["frechet", "clip_score"], has_captions=True)
    metrics = build_metrics(found, ["frechet", "clip_score"], AccelerateRuntime("fp32", device="cpu"))
    assert metrics["clip_score"].settings["weight"] == 2.5
    assert metrics["clip_score"].settings["prefix"] == "A photo depicts "
    assert sections()["clip_score"]["folder"] == "cache/clip-vit-large-patch14"


def test_two_metrics_of_captions_in_one_evaluation_are_refused() -> None:
    found = sections()
    found["other"] = {**found["clip_score"], "folder": "cache/other"}
    with pytest.raises(ValueError, match="clip_score and other compare images with their captions, but an evaluation"):
        require_metrics(found, ["clip_score", "frechet", "other"], has_captions=True)
    require_metrics(found, ["clip_score", "clip_score"], has_captions=True)


def test_images_without_captions_are_refused_before_a_clip_is_looked_for(
    run: Path,  # noqa: F811
    digits: Path,
    in_process: InProcess,
) -> None:
    sentence = "clip_score compares images with their captions, but the images of this model have none"
    assert sentence in in_process(*EVALUATE, "metrics=[frechet,clip_score]", expect=2)
    words = ["evaluate_every=2", "evaluation.metrics=[clip_score]"]
    assert sentence in in_process(*train(digits, *words), expect=2)
    assert not (run / "evaluations.jsonl").exists()


def test_runs_with_other_captions_share_no_curve(tmp_path: Path) -> None:
    write_run(tmp_path, "one", record_of(16, 40.0, captions_hash="c", clip_score=20.0))
    write_run(tmp_path, "two", record_of(32, 20.0, captions_hash="c", clip_score=25.0))
    assert [row["clip_score"] for row in read_study(tmp_path).rows] == [20.0, 25.0]
    write_run(tmp_path, "three", record_of(64, 10.0))
    with pytest.raises(ValueError, match='cannot share a curve: captions_hash is "c" in one and null in the other'):
        read_study(tmp_path)


def changed(file: str, *place: str, value: Any = None) -> Callable[[Path], None]:
    """Return a change of a value in a JSON file; None removes it."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner.pop(place[-1]) if value is None else inner.update({place[-1]: value})
        (folder / file).write_text(json.dumps(content))

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(content))


def void(_: object) -> None:
    pass


CONFIG, IMAGES = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (removed(CONFIG), r"There is no .*config\.json; copy .* by evaluation\.metric\.clip_score\.folder=PATH"),
        (removed("model.safetensors"), r"There is no .*model\.safetensors; copy config\.json, the weights, prepr"),
        (removed(IMAGES), r"There is no .*preprocessor_config\.json; copy config\.json, the weights, prepr"),
        (
            removed("vocab.json"),
            r"There is no tokenizer in .* folder by evaluation\.metric\.clip_score\.tokenizer=PATH",
        ),
        (replaced(CONFIG, "{"), "is not the JSON of a model"),
        (replaced(IMAGES, "{"), r"preprocessor_config\.json is damaged: it is not JSON"),
        (replaced("model.safetensors", "x" * 99), "does not hold a readable CLIP"),
        (lambda folder: void(write_small_clip(folder)), "is of a clip_text_model, not of a clip; name the folder"),
        (changed(CONFIG, "vision_config"), "it has no section vision_config"),
        (changed(CONFIG, "vision_config", "patch_size", value="14"), "patch_size is '14', but"),
        (changed(CONFIG, "vision_config", "num_attention_heads", value=3), "hidden_size 16 is not a multiple of num"),
        (changed(CONFIG, "vision_config", "num_hidden_layers", value=3), r"lacks \d+ of the weights of its config"),
        (changed(CONFIG, "projection_dim", value=9), r"of shape \[8, 16\], but its config asks for \[9, 16\]"),
        (
            changed(CONFIG, "vision_config", "image_size", value=42),
            "crops images to 28 pixels, but the network in .* 42",
        ),
        (changed(IMAGES, "crop_size", value=56), "it crops 56 x 56 pixels from images of shortest side 28"),
        (changed(IMAGES, "crop_size", value={"height": 28, "width": 14}), "it crops 28 x 14 pixels"),
        (changed(IMAGES, "size", value={"height": 28, "width": 28}), "preprocessor_config.json is damaged: size"),
        (changed(IMAGES, "resample", value=2), "resample is 2, but"),
        (changed(IMAGES, "do_center_crop", value=False), "do_center_crop is False, but"),
        (changed(IMAGES, "rescale_factor", value=1.0), r"rescale_factor is 1\.0, but"),
        (changed(IMAGES, "image_std", value=[0.0, 1.0, 1.0]), r"image_std\.0 is 0\.0, but"),
        (changed(IMAGES, "image_mean"), "it has no image_mean"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(
    copy: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=sentence) as refused:
        CLIPScore(str(copy))
    assert "\n" not in str(refused.value)


def test_weights_or_images_that_have_no_cosine_are_refused(copy: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"The images have 4 channels, but .* sees 3"):
        CLIPScore(str(folder)).scorer(images_of(2, 28, 28, 4), ["a", "of"])
    weights = load_file(copy / "model.safetensors")
    large = torch.full_like(weights["visual_projection.weight"], 3e38)
    save_file({**weights, "visual_projection.weight": large}, copy / "w")
    (copy / "w").rename(copy / "model.safetensors")
    with pytest.raises(ValueError, match="copy gives cosines that are not finite"):
        CLIPScore(str(copy)).scorer(images_of(2, 28, 28, 3), ["a", "of"])
    for settings in ({"weight": 0.0}, {"weight": float("nan")}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="needs a weight above 0, such as 100, and a batch of at least 1"):
            CLIPScore(str(folder), **settings)  # type: ignore[arg-type]


def test_without_transformers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="run `pip install transformers`"):
        CLIPScore(str(folder))
