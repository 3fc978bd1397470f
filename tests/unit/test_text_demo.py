"""The demo of text: its encoder needs no files, and what is held out of training is, and is shown as such."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcess, json_lines, prepared_by
from PIL import Image
from test_house import composed
from test_report import only_figures, record_of, write_run

from data.random_text import RandomText
from data.shards import MappedShards
from data.text_encoders import EncodedText
from evaluation.features.extractor import Features
from evaluation.recognition import MOST_PROMPTS, Recognition
from launch.builders.named_encoder import NamedEncoder
from report.prompts import prompts_of
from report.study import read_study
from report.write import write_report

CAPTIONS = ["a drawing of a three", "Digit 37!", "", "three of a drawing"]
ENCODED = ["data=digits", "data/captions=digits", "data/text_encoder=random", "data.shards=shards/digits_text"]
SHORT = [
    "total_steps=2",
    "log_every=2",
    "checkpoint_every=2",
    "evaluate_every=2",
    "sample_every=null",
    "sampler.steps=1",
]
SHORT += ["batch_size=8", "model.depth=1", "model.width=16", "model.num_heads=2", "train/logger=none"]
SHORT += ["evaluation.num_images=90", "evaluation.features.epochs=1", "run_dir=run"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shards of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    prepared_by("encode", *ENCODED, cwd=folder)
    return folder


def of(encoder: RandomText, captions: list[str]) -> EncodedText:
    found = encoder.tokenize(captions)
    return encoder.encode(torch.from_numpy(found.ids), torch.from_numpy(found.mask))


def test_the_encoder_follows_from_its_settings_and_its_hash_from_its_weights() -> None:
    one, again, other = RandomText(), RandomText(), RandomText(seed=1)
    assert one.spec() == again.spec()
    assert len({encoder.spec().revision for encoder in (one, other, RandomText(num_heads=2))}) == 3
    for part, same in zip(of(one, CAPTIONS), of(again, CAPTIONS), strict=True):
        assert torch.equal(part, same)
    assert not torch.equal(of(one, CAPTIONS).pooled, of(other, CAPTIONS).pooled)
    whole = of(one, CAPTIONS)
    assert (whole.tokens.shape, whole.pooled.shape) == ((4, 16, 64), (4, 64))
    torch.testing.assert_close(whole.tokens.var(dim=2, correction=0), torch.ones(4, 16), atol=1e-3, rtol=0)


def test_words_digits_and_signs_are_tokens_and_longer_captions_are_truncated() -> None:
    found = RandomText(length=6).tokenize(CAPTIONS)
    assert found.mask.sum(axis=1).tolist() == [6, 5, 1, 5]  # with the end, after which comes padding
    assert found.num_truncated == 0
    assert found.ids[3, :4].tolist() == found.ids[0, [4, 2, 0, 1]].tolist()
    alone = RandomText(length=6).tokenize(["digit", "3", "7", "!"]).ids[:, 0]
    assert found.ids[1, :4].tolist() == alone.tolist()
    shorter = RandomText(length=4).tokenize(CAPTIONS)
    assert shorter.num_truncated == 3
    assert shorter.ids[0].tolist() == [*found.ids[0, :3], found.ids[2, 0]]  # the end stays


def test_what_follows_a_captions_end_changes_nothing() -> None:
    encoder = RandomText()
    found = encoder.tokenize(CAPTIONS)
    ids, mask = torch.from_numpy(found.ids), torch.from_numpy(found.mask)
    whole, other = encoder.encode(ids, mask), encoder.encode(torch.where(mask, ids, 77), mask)
    torch.testing.assert_close(other.tokens[mask], whole.tokens[mask])
    torch.testing.assert_close(other.pooled, whole.pooled)
    cut = encoder.encode(ids[:, :6], mask[:, :6])
    torch.testing.assert_close(cut.tokens[mask[:, :6]], whole.tokens[mask])
    torch.testing.assert_close(encoder.encode(ids[1:2], mask[1:2]).pooled, whole.pooled[1:2])
    assert (whole.pooled[0] - whole.pooled[3]).abs().max() > 0.1  # it hears the order of words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "text_encoder.length is 1, but it must be from 2 to 4096"),
        ({"vocabulary": 10**9}, "text_encoder.vocabulary is 1000000000, but it must be from 3 to 65536"),
        ({"width": 60}, "text_encoder.width is 60, but it must be a multiple of twice the 4 heads; use 56"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomText(**settings)


def test_no_two_words_of_the_demo_share_an_id_and_some_are_held_out(encoded: Path) -> None:
    prompts = composed("train", "experiment=demo/text")["condition"]["prompts"]
    shards = MappedShards(encoded / "shards/digits_text")
    captions = {caption for row in range(len(shards)) for caption in shards.captions_of(row)}
    words = sorted({word for text in [*captions, *prompts] for word in text.lower().split()})
    ids = RandomText().tokenize(words).ids
    assert len({tuple(row) for row in ids.tolist()}) == len(words)
    assert {"three", "3"} <= set(words)
    assert 20 <= len(set(prompts) - captions) < len(prompts)


def test_a_run_records_how_often_each_prompt_is_obeyed_and_which_were_held_out(
    encoded: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoded)
    in_process("train", "experiment=demo/text", *SHORT)
    record = json_lines(encoded / "run/evaluations.jsonl")[-1]
    counts = record["recognized_by_prompt"]
    settings = composed("train", "experiment=demo/text")["condition"]
    assert [count["prompt"] for count in counts] == settings["prompts"]
    assert [count["label"] for count in counts] == settings["prompt_classes"]
    assert sum(count["images"] for count in counts) == record["num_images"] == 90
    recognized = sum(count["recognized"] for count in counts)
    assert recognized / 90 == record["recognized_fraction"]
    shards = MappedShards("shards/digits_text")
    captions = {caption for row in range(len(shards)) for caption in shards.captions_of(row)}
    assert [count["held_out"] for count in counts] == [prompt not in captions for prompt in settings["prompts"]]
    shown = in_process("train", "experiment=demo/text", *SHORT[:-1], "run_dir=x", "condition.held_out=[one]", expect=2)
    assert "condition.held_out has 1 prompts, but" in shown
    Path("own.jsonl").write_text('{"prompt": "an own three", "class": 3}\n{"prompt": "an own four", "class": 4}\n')
    words = [
        "prompts=own.jsonl",
        "diffusion/sampler=euler",
        "sampler.steps=1",
        "evaluation.num_images=6",
        "evaluation.features.epochs=1",
    ]
    in_process("evaluate", "checkpoint=run", "runtime=cpu", *words)
    own = json_lines(encoded / "run/evaluations.jsonl")[-1]["recognized_by_prompt"]
    assert [(count["label"], count["images"], count["held_out"]) for count in own] == [(3, 3, None), (4, 3, None)]


def test_counts_are_those_of_all_processes_and_absent_where_there_are_many_prompts() -> None:
    classes, texts = np.array([3, 4, 3, 4, 3]), ["a", "b", "a", "b", "a"]
    halves = [Recognition(classes, texts, frozenset({"b"})) for _ in range(2)]
    vectors = np.zeros((3, 1), np.float32)
    halves[0].add(np.array([0, 1, 2]), Features(vectors, np.array([3, 3, 5])))
    halves[1].add(np.array([3, 4]), Features(vectors[:2], np.array([4, 3])))
    every = np.concatenate([half._counts for half in halves])
    assert halves[0].merged(lambda _: every) == {
        "recognized_fraction": 0.6,
        "recognized_by_prompt": [
            {"prompt": "a", "label": 3, "images": 3, "recognized": 2, "held_out": False},
            {"prompt": "b", "label": 4, "images": 2, "recognized": 1, "held_out": True},
        ],
    }
    count = MOST_PROMPTS + 1
    many = Recognition(np.zeros(count, np.int64), [str(i) for i in range(count)], None)
    many.add(np.arange(count), Features(np.zeros((count, 1), np.float32), np.zeros(count, np.int64)))
    assert many.merged(lambda counts: counts) == {"recognized_fraction": 1.0}
    assert Recognition(None, texts, None).merged(lambda counts: counts) == {"recognized_fraction": None}


def count_of(prompt: str, held_out: bool | None, recognized: int = 3) -> dict[str, Any]:
    return {"prompt": prompt, "label": 3, "images": 4, "recognized": recognized, "held_out": held_out}


def test_the_report_draws_the_prompts_of_all_models_and_escapes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    counts = [count_of("$a$ <b>", False), count_of("c" * 200, True), count_of("d", None)]
    write_run(tmp_path, "one", record_of(16, 40.0, recognized_by_prompt=counts))
    write_run(tmp_path, "two", record_of(32, 20.0, recognized_by_prompt=[count_of("$a$ <b>", False, 1)]))
    study = read_study(tmp_path)
    assert [obeyed.fractions for obeyed in prompts_of(study)] == [(0.75, 0.25), (0.75,), (0.75,)]
    report = write_report(study, tmp_path / "report")
    assert Image.open(report.pictures["prompts"]).size[0] > 1000
    page = report.page.read_text()
    assert 'id="figure-prompts"' in page
    assert "A prompt is held out where no caption" in html.unescape(page)
    assert "a figure with a name is not in the paper" in page
    again = read_study(tmp_path / "report/study.jsonl")
    assert prompts_of(again) == prompts_of(study)
    (tmp_path / "one/evaluations.jsonl").write_text(json.dumps(record_of(16, 40.0)) + "\n")
    (tmp_path / "two/evaluations.jsonl").write_text(json.dumps(record_of(32, 20.0)) + "\n")
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert not (tmp_path / "report/figure_prompts.png").exists()


@pytest.mark.parametrize(
    "wrong", [{"recognized": 5}, {"images": 0}, {"prompt": "a\x1b[31m"}, {"held_out": 1}, {"label": -1}], ids=str
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_run(tmp_path, "one", record_of(16, 40.0, recognized_by_prompt=[{**count_of("a", None), **wrong}]))
    with pytest.raises(ValueError, match=r"one/evaluations\.jsonl is damaged: recognized_by_prompt"):
        read_study(tmp_path)


def test_the_note_on_an_export_says_how_to_give_this_encoder_which_has_no_folder() -> None:
    note = NamedEncoder(RandomText().spec(), attend_to_padding=False, class_dropout=0.1).note()
    assert "give data/text_encoder=random to the jobs that use it." in note
