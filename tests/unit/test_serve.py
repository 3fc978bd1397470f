"""The page of ``ditscale serve`` samples what ``ditscale sample`` does, for this machine only, and refuses in words."""

import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fast_hydra
import numpy as np
import pytest
from chromium import needs_chromium, opened
from conftest import TINY_RUN, InProcess, prepared_by, warm
from omegaconf import OmegaConf
from PIL import Image
from test_bad_input import fails
from text_runs import write_text_run
from warm_jobs import TRAINING

from data.conditions import ClassLabels, Unconditional
from launch.command.settings import ServeSettings

pytest.importorskip("gradio", reason="needs Gradio: the extra `pinned`, which make test installs")

from gradio_client import Client
from gradio_client.exceptions import AppError

from launch.page.fields import IN_TURN, NO_CLASS, ClassField, Facts, NoFields, fields_for
from launch.page.page import application_of, build_page, private_gradio
from launch.page.server import closed_to_others, listen, served, url_of
from launch.page.streams import Show, Streams
from launch.page.studio import Form, Studio, number, whole_number

SERVE = ["runtime=cpu", "weights=model", "batch_size=5"]
CLASSES, FREE, TEXTS = "classes", "free", "texts/run"  # folders of the runs


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with short runs: of the digits' classes, a flow without a condition, and of the captions."""
    folder = tmp_path_factory.mktemp("runs")
    short = [*TINY_RUN, "total_steps=4", "checkpoint_every=4", "optimizer.lr=1e-2", f"data.shards={digits}"]
    prepared_by("train", *short, f"run_dir={CLASSES}", cwd=folder)
    flow = ["diffusion=flow", "diffusion/sampler=euler", "data/condition=none"]
    prepared_by("train", *short, *flow, f"run_dir={FREE}", cwd=folder)
    write_text_run(folder / "texts", "condition.prompts=[a drawing of a three,digit seven]")
    return folder


def settings_of(*words: str) -> ServeSettings:
    """Return the settings of a command line."""
    plain = OmegaConf.to_container(fast_hydra.composed("serve", *SERVE, *words), resolve=True, enum_to_str=True)
    return ServeSettings.of(plain)  # type: ignore[arg-type]


class Served:
    """A page that is served in this process, and a client of its interface for programs."""

    def __init__(self, studio: Studio, url: str, files: Path) -> None:
        self.studio, self.url = studio, url
        self.client = Client(url, verbose=False, download_files=str(files))

    def sample(self, *values: Any) -> tuple[np.ndarray, list[str]]:
        """Return the last picture for these values of the page's fields, and the text of every view."""
        job = self.client.submit(*values, api_name="/sample")
        path, _ = job.result(timeout=60)
        return np.asarray(Image.open(path)), [text for _, text in job.outputs()]


@contextmanager
def page_of(run: Path, files: Path, *words: str) -> Iterator[Served]:
    """Serve a run's page within the block."""
    with private_gradio(), closing(listen("127.0.0.1", 0)) as listener:
        studio = Studio.of(settings_of(f"checkpoint={run}", *words))
        application = closed_to_others(application_of(build_page(studio), ["127.0.0.1"]))
        with served(application, listener), closing(studio.streams):
            yield Served(studio, url_of(listener), files)


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with page_of(runs / CLASSES, tmp_path_factory.mktemp("files")) as found:
        yield found


@pytest.fixture(scope="module")
def text_page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with page_of(runs / TEXTS, tmp_path_factory.mktemp("files")) as found:
        yield found


def by_sample(runs: Path, run: str, in_process: InProcess, *words: str) -> np.ndarray:
    """Return the grid that `ditscale sample` writes."""
    in_process("sample", f"checkpoint={runs / run}", *SERVE, *words, "out=grid")
    return np.asarray(Image.open("grid.png"))


GUIDED = ["diffusion/guidance=classifier_free"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("3", 7, "ddpm", "12", 2.5, "7"), ["sampler.steps=12", *GUIDED, "guidance.scale=2.5", "labels=[7]"]),
        (("3", 12, "ddim", "ddim8", 1, IN_TURN), ["diffusion/sampler=ddim", "sampler.steps=ddim8"]),
        ((3, "4", "ddim", 6, "1.0", NO_CLASS), ["diffusion/sampler=ddim", "sampler.steps=6", "labels=[10]"]),
    ],
    ids=["one class with guidance", "all classes, several batches", "no class"],
)
def test_the_page_shows_the_bits_that_sample_writes(
    values: Sequence[Any], words: list[str], page: Served, runs: Path, in_process: InProcess
) -> None:
    found, _ = page.sample(*values)
    expected = by_sample(runs, CLASSES, in_process, "seed=3", f"num_images={values[1]}", *words)
    assert np.array_equal(found, expected)


def test_a_network_without_classes_has_a_page_without_class_and_guidance(
    runs: Path, tmp_path: Path, in_process: InProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    with page_of(runs / FREE, tmp_path) as page:
        notes = capfd.readouterr().err
        found, _ = page.sample("5", 3, "heun_ode", "4", None)
        samplers = list(page.studio.samplers)
    assert samplers == ["euler", "euler_maruyama", "flow_dpm_solver_pp", "heun_ode", "stochastic_heun", "dopri5"]
    assert "does not know the null condition, so the page has no guidance." in notes
    assert "note: sampler ddpm does not fit diffusion=flow, so the page begins with euler." in notes
    words = ["seed=5", "num_images=3", "diffusion/sampler=heun_ode", "sampler.steps=4"]
    assert np.array_equal(found, by_sample(runs, FREE, in_process, *words))


@pytest.mark.parametrize(
    ("prompts", "negative", "words"),
    [
        ("a three\n\n  digit 'seven'\n", "a one", ["prompts=[a three,\"digit 'seven'\"]", "negative_prompt='a one'"]),
        ("a three", "", ["prompts='a three'"]),
        ("a three\na three\nthe one", " ", ["prompts=[a three,a three,the one]", "negative_prompt=''"]),
    ],
    ids=["two with a negative one", "one", "three columns"],
)
def test_the_page_of_prompts_shows_the_bits_that_sample_writes(
    prompts: str, negative: str, words: list[str], text_page: Served, runs: Path, in_process: InProcess
) -> None:
    found, texts = text_page.sample("3", 7, "ddim", "6", 2.5, prompts, negative)
    words = [*words, "seed=3", "num_images=7", "diffusion/sampler=ddim", "sampler.steps=6", "guidance.scale=2.5"]
    assert np.array_equal(found, by_sample(runs, TEXTS, in_process, *words, *GUIDED))
    count = sum(bool(line) for line in prompts.splitlines())
    assert ("prompt 'a three'" if count == 1 else f"{count} prompts in turn") in texts[-1]
    assert ("negative prompt 'a one'" in texts[-1]) == (negative == "a one")


def test_the_page_of_prompts_says_what_is_truncated_and_refuses_what_is_no_text(text_page: Served) -> None:
    form = ["0", 2, "ddim", "2", 1]
    long = "a number of numbers of numbers of numbers"
    _, texts = text_page.sample(*form, f"{long}\na three", "")
    assert texts[-1].endswith("; 1 of 2 prompts is longer than the 12 tokens of clip_text, and truncated.")
    for prompts, negative, sentence in (
        (" \n", "", "prompts is empty; give at least one line."),
        (None, "", "prompts is empty, but it must be a text."),
    ):
        with pytest.raises(AppError) as answer:
            text_page.sample(*form, prompts, negative)
        assert str(answer.value) == sentence
    with pytest.raises(ValueError, match=r"^negative prompt is 3, but it must be a text\.$"):
        text_page.studio.fields.asked(["a", 3], 2)


def test_a_page_without_guidance_has_no_negative_prompt(runs: Path) -> None:
    config = settings_of(f"checkpoint={runs / TEXTS}", "diffusion/guidance=none", "prompts=['a\tb',c]")
    with private_gradio(), build_page(studio := Studio.of(config)):
        (prompts,) = studio.fields.components()
    assert prompts.value == "a b\nc"
    with pytest.raises(ValueError, match="negative_prompt is given, but only guidance by the null condition uses it"):
        Studio.of(settings_of(f"checkpoint={runs / TEXTS}", "diffusion/guidance=none", "negative_prompt=x"))


def test_images_are_shown_as_they_are_denoised_and_a_finished_one_stays(page: Served) -> None:
    studio = page.studio
    views = list(studio.views(Form("0", 7, "ddpm", "10", 1, [IN_TURN])))
    texts = [view.text for view in views]
    assert texts[:3] == ["call 5 of 10 of the network", "call 10 of 10 of the network", "4 of 7 images are done"]
    assert texts[3:] == [
        "4 of 7 images are done, call 5 of 10 of the network",
        "4 of 7 images are done, call 10 of 10 of the network",
        "7 images: seed 0, ddpm, all classes in turn, 10 steps",
    ]
    width = views[0].picture.shape[1] * 4 // 7
    assert (views[0].picture[:, width + 2 :] == 255).all()  # not begun
    assert not np.array_equal(views[0].picture, views[2].picture)
    for view in views[3:]:
        assert np.array_equal(view.picture[:, :width], views[2].picture[:, :width])


def test_an_image_depends_on_seed_index_and_class_alone(page: Served) -> None:
    alone, _ = page.sample("9", 3, "ddpm", "10", 2, "4")
    among, _ = page.sample("9", 9, "ddpm", "10", 2, "4")
    assert np.array_equal(among[:, : alone.shape[1] - 2], alone[:, :-2])  # up to the gap on the right
    assert not np.array_equal(page.sample("8", 3, "ddpm", "10", 2, "4")[0], alone)


GOOD = {"seed": "0", "count": 2, "sampler": "ddpm", "steps": "2", "scale": 1, "class": IN_TURN}


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"steps": "0"}, "sampler.steps is 0, but a sampler needs at least 2 steps; choose between 2 and 1000."),
        ({"steps": "many"}, "sampler.steps is 'many', but it must be like 250, ddim50 or [10,15,20]."),
        ({"steps": "10,x"}, "sampler.steps is '10,x', but it must be like 250, ddim50 or [10,15,20]."),
        ({"steps": ""}, "sampler.steps is '', but it must be like 250, ddim50 or [10,15,20]."),
        ({"class": "seven"}, "labels has 'seven', but there is no such class"),
        ({"class": "11"}, "labels has 11, but this model knows the classes 0 to 9, and 10 for none"),
        ({"class": None}, "labels has None, but there is no such class"),
        ({"class": "<img src=x>"}, "labels has '&lt;img src=x&gt;', but there is no such class"),
        ({"seed": "abc"}, "seed is 'abc', but it must be a whole number; change it."),
        ({"seed": "-1"}, "seed is -1, but it must be between 0 and"),
        ({"count": 0}, "number of images is 0, but the page shows from 1 to 100; use `ditscale sample` for more."),
        ({"count": None}, "number of images is empty, but it must be a whole number; change it."),
        ({"count": 2.5}, "number of images is 2.5, but it must be a whole number; change it."),
        ({"scale": -1}, "guidance.scale is -1.0, but it must be at least 0; 1 means no guidance."),
        ({"scale": "a lot"}, "guidance scale is 'a lot', but it must be a number; change it."),
        ({"sampler": "ddmp"}, "There is no sampler 'ddmp' for this checkpoint; did you mean 'ddpm'?"),
        ({"sampler": "euler"}, "There is no sampler 'euler' for this checkpoint"),
    ],
    ids=str,
)
def test_a_bad_value_is_answered_with_a_sentence_and_without_a_traceback(
    bad: dict[str, Any], sentence: str, page: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AppError) as answer:
        page.sample(*{**GOOD, **bad}.values())
    assert str(answer.value).startswith(sentence)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [True, [1], float("nan"), float("inf"), {}, "1.5", 1.5, None])
def test_only_whole_numbers_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed is .*, but it must be a whole number; change it"):
        whole_number("seed", value)
    assert whole_number("seed", 2.0) == whole_number("seed", " 2 ") == 2


@pytest.mark.parametrize("value", [float("nan"), "inf", None, [], "x"])
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^scale is .*, but it must be (a number|finite); change it"):
        number("scale", value)
    assert number("scale", "1.5") == number("scale", 1.5) == 1.5


def test_the_fields_are_those_of_the_sources_kind() -> None:
    class Parities(ClassLabels):
        """Labels of a kind of their own."""

    class Sound(Unconditional):
        pass

    class Strange:
        num_classes = 3

    facts = Facts(["cat", "dog", "cat"], True, "RUN")
    assert isinstance(fields_for(Sound(), facts), NoFields)
    field = fields_for(Parities(3), facts)
    assert isinstance(field, ClassField)
    assert field.asked(["cat"], 2).condition["label"].tolist() == [0, 0]  # the first of that name, as for `sample`
    assert field.asked([NO_CLASS], 2).condition["label"].tolist() == [3, 3]
    assert field.asked([IN_TURN], 4).condition["label"].tolist() == [0, 1, 2, 0]
    unnamed = fields_for(Parities(3), Facts([], False, "RUN"))
    assert unnamed.asked(["2"], 1).condition["label"].tolist() == [2]
    with pytest.raises(ValueError, match="labels has 'no class'"):
        unnamed.asked([NO_CLASS], 1)
    with pytest.raises(ValueError, match="RUN is conditioned by Strange, for which the page has no fields"):
        fields_for(Strange(), facts)  # type: ignore[arg-type]


def test_work_that_nobody_looks_at_ends_and_the_next_begins_after_it() -> None:
    streams: Streams[int] = Streams()
    ended, looks = [], threading.Event()

    def count(show: Show[int]) -> None:
        try:
            show(0)
            looks.wait()
            while True:
                show(None)
        finally:
            ended.append("first")

    first = streams.views(count)
    assert next(first) == 0
    first.close()  # type: ignore[attr-defined]
    second = streams.views(lambda show: show(len(ended)))
    threading.Timer(0.2, looks.set).start()
    assert list(second) == [1]

    def fail(show: Show[int]) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        list(streams.views(fail))
    last = streams.views(count)
    next(last)
    streams.close()
    assert ended == ["first", "first"]
    assert list(last) == []


def answer_of(url: str, host: str) -> tuple[int, str]:
    """Return the status of a page, and where its browser may fetch from."""
    request = urllib.request.Request(url, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return found.status, found.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Security-Policy"]


def test_the_page_is_for_this_machine_and_fetches_from_no_other(page: Served) -> None:
    host = page.url.removeprefix("http://")
    assert host.startswith("127.0.0.1:")
    status, policy = answer_of(page.url, host)
    assert status == 200
    assert "default-src 'self' data: blob:;" in policy
    assert "http" not in policy
    assert answer_of(page.url, "elsewhere.example")[0] == 400  # a name of another site that leads here
    port = int(host.partition(":")[2])
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))  # another address of this machine
    config = json.loads(urllib.request.urlopen(f"{page.url}/config").read())
    assert config["analytics_enabled"] is False


def test_another_host_a_port_that_is_none_or_in_use_and_a_missing_gradio_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        return fails(["serve", "checkpoint=missing", *words], monkeypatch, capfd)

    assert refused("host=0.0.0.0").startswith("host is 0.0.0.0, which other machines may reach, and the page asks for")
    assert refused("port=70000") == "port is 70000, but ports are from 1 to 65535, and 0 is any; set another."
    with closing(listen("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        sentence = f"port {port} of 127.0.0.1 is in use by another program; set port={port + 1}."
        assert refused(f"port={port}") == sentence
    absent = refused("host=192.0.2.1", "allow_remote=true")  # an address for examples, which nobody has
    assert absent.startswith("host 192.0.2.1 cannot be served at (Cannot assign requested address)")
    assert "checkpoint" in refused("port=0")  # all else fits
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused() == (
        "ditscale serve needs Gradio, which is not installed; install the extra `serve`: "
        "pip install -e '.[serve]' -c constraints.txt."
    )


@pytest.mark.parametrize(("number", "is_sampling"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_the_page_with_code_0(number: int, is_sampling: bool, runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    words = ["serve", f"checkpoint={runs / CLASSES}", "port=0", *SERVE, "sampler.steps=1000", "num_images=100"]
    job = warm(*TRAINING).start(words, tmp_path, output, {"TMPDIR": str(tmp_path)})
    url = waited_for(lambda: output.read_text() if output.exists() else "").partition(" at ")[2].partition(" ")[0]
    if is_sampling:
        client = Client(url, verbose=False, download_files=str(tmp_path / "files"))
        sampling = client.submit(api_name="/sample")
        waited_for(lambda: "".join(text for _, text in sampling.outputs()), "call 5 of 1000")
    job.send_signal(number)
    assert job.wait(60) == 0, output.read_text()
    assert "Traceback" not in output.read_text()
    assert not list(tmp_path.glob("ditscale-serve-*"))  # the pictures are gone


def waited_for(read: Callable[[], str], part: str = "(Ctrl-C ends the page)", limit_sec: float = 60) -> str:
    """Return a growing text as soon as it has this part."""
    end = time.monotonic() + limit_sec
    while part not in (text := read()):
        assert time.monotonic() < end, text
        time.sleep(0.05)
    return text


class TwoProcesses:
    """A part of the environment that shows a job of several processes."""

    data_world = 2

    def __init__(self, precision: str) -> None:
        pass


def test_several_processes_are_refused() -> None:
    config = settings_of("checkpoint=missing")
    config.runtime = {"_target_": f"{__name__}.TwoProcesses"}
    with pytest.raises(ValueError, match="ditscale serve runs in one process, but there are 2; start one"):
        Studio.of(config)


BUTTON = "[...document.querySelectorAll('button')].find(one => one.textContent.trim() === 'Sample')"
FIELD = "[...document.querySelectorAll('label')].find(one => one.textContent.includes('{}'))?.querySelector('textarea')"
SHOWN = FIELD.format("shown") + "?.value"
WIDTH = "[...document.images].find(one => one.src.includes('/file='))?.naturalWidth"


def test_sampling_that_is_cancelled_leaves_the_device_to_the_next(page: Served) -> None:
    long = page.client.submit("0", 100, "ddpm", "1000", 1, IN_TURN, api_name="/sample")
    waited_for(lambda: "".join(text for _, text in long.outputs()), "call 5 of 1000")
    long.cancel()
    start = time.monotonic()
    page.sample("0", 1, "ddpm", "2", 1, IN_TURN)
    assert time.monotonic() - start < 10  # the other one takes a minute


@needs_chromium
def test_a_browser_samples_and_sees_a_sentence_for_a_bad_value(page: Served, text_page: Served, tmp_path: Path) -> None:
    with opened(page.url, tmp_path / "profile") as browser:
        browser.wait_for(f"!!{BUTTON}")
        enter = "const found = {}; found.value = '{}'; found.dispatchEvent(new Event('input', {{bubbles: true}}));"
        steps = FIELD.format("steps")
        browser.evaluate(f"(() => {{ {enter.format(steps, 50)} {BUTTON}.click(); }})()")
        texts = {browser.wait_for(f"{SHOWN}?.startsWith('call') && {SHOWN}")}  # before the end
        browser.wait_for(f"{SHOWN}?.startsWith('20 images: seed 0, ddpm, all classes in turn, 50 steps')")
        expected = list(page.studio.views(Form("0", 20, "ddpm", "50", 1.5, [IN_TURN])))[-1]
        assert browser.wait_for(WIDTH) == expected.picture.shape[1]
        assert all("of 50 of the network" in text for text in texts)
        browser.evaluate(f"(() => {{ {enter.format(FIELD.format('seed'), 'abc')} {BUTTON}.click(); }})()")
        browser.wait_for("document.body.innerText.includes(\"seed is 'abc', but it must be a whole number\")")
        origins = "[...new Set(performance.getEntriesByType('resource').map(one => new URL(one.name).origin))]"
        assert browser.evaluate(origins) == [page.url]
        browser.evaluate(f"void (location.href = '{text_page.url}')")
        prompts, negative = FIELD.format("prompts"), FIELD.format("negative prompt")
        browser.wait_for(f"{prompts}?.value === 'a drawing of a three\\ndigit seven' && !!{BUTTON}")
        both = [enter.format(prompts, "a three\\ndigit one\\nof"), enter.format(negative, "seven")]
        fields = "".join(f"{{ {words} }}" for words in both)
        browser.evaluate(f"(() => {{ {fields} {BUTTON}.click(); }})()")
        browser.wait_for(f"{SHOWN}?.includes('3 prompts in turn, negative prompt \\'seven\\'')")
        assert browser.wait_for(WIDTH) == 3 * 66 + 2  # a column for each prompt
