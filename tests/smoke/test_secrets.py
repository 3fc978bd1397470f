"""No job, as a user types it, prints or writes the passwords and keys in URLs."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import TINY_RUN, InProcess, ditscale, json_lines
from listing_server import ListingServer
from pictures import make_image_folder
from poisoned_shards import poisoned

LOGIN = "reader:pass-w0rd/4321"  # with a slash, which a URL writes as %2F
TYPED = LOGIN.replace("/", "%2F")
SIGNATURE = "5f0c1d7e9a"  # of a URL that was signed
FORBIDDEN = [b"pass-w0rd", b"w0rd", SIGNATURE.encode(), base64.b64encode(LOGIN.encode())]
OFFLINE = {"WANDB_MODE": "offline"}
FEW = ["sampler.steps=2", "evaluation.num_images=20", "evaluation.features.epochs=1", "evaluation.batch_size=10"]
NOISES = "diffusion.schedule.num_steps=20"  # each is a pass through the network where likelihoods are measured


@pytest.fixture
def web(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ListingServer]:
    """Yield a server with the digits' shards, some images, and room for a run."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(digits, folder / "digits")
    make_image_folder(folder / "images", per_class=2)
    with ListingServer(folder, LOGIN).running() as server:
        yield server


def private(server: ListingServer, name: str) -> str:
    return f"{server.url.replace('://', f'://{TYPED}@')}/{name}"


def assert_no_secret(shown: str, folder: Path) -> None:
    """Check that no secret is in what was printed, or in the name or content of any file."""
    for secret in FORBIDDEN:
        assert secret not in shown.encode(), shown
        for path in folder.rglob("*"):
            assert secret not in str(path.relative_to(folder)).encode(), path
            assert not path.is_file() or secret not in path.read_bytes(), (secret, path)


def train(web: ListingServer, *more: str, cwd: Path, expect: int = 0, env: dict[str, str] | None = None) -> str:
    words = [*TINY_RUN, f"data.shards='{private(web, 'digits')}'", "run_dir=run", "train/logger=wandb", *FEW]
    words += ["total_steps=10", "resume.allow=[total_steps]", NOISES]
    return ditscale("train", *words, *more, cwd=cwd, expect=expect, env={**OFFLINE, **(env or {})})


def test_a_run_and_what_is_made_of_it_keep_no_password(web: ListingServer, tmp_path: Path) -> None:
    shown = train(web, "evaluate_every=10", cwd=tmp_path)
    shown += train(web, "total_steps=20", "evaluate_every=10", cwd=tmp_path)  # continues on a config without password
    host = web.url.removeprefix("http://")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["shards"] == f"http://***@{host}/digits"
    assert [line["step"] for line in json_lines(tmp_path / "run/evaluations.jsonl")] == [10, 20]
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))) == 2
    shutil.copytree(tmp_path / "run", web.folder / "run")
    run = private(web, "run")
    shown += ditscale("sample", f"checkpoint='{run}'", *FEW[:1], "num_images=2", "out=grid", cwd=tmp_path)
    shown += ditscale("export", f"checkpoint='{run}'", "to=reference", "out=weights.pt", cwd=tmp_path)
    guide = ["diffusion/guidance=autoguidance", f"guidance.guide='{run}'", "guidance.scale=2"]
    nll = ["metrics=[frechet,nll]", f"data.shards='{private(web, 'digits')}'", "runtime=cpu"]
    shown += ditscale("evaluate", f"checkpoint='{run}/checkpoints/step_00000020'", *FEW, *guide, *nll, cwd=tmp_path)
    (record,) = json_lines(tmp_path / f"cache/runs/http/{host}/run/evaluations.jsonl")[-1:]
    assert record["guidance"]["guide"] == f"http://***@{host}/run"
    assert_no_secret(shown, tmp_path)


def test_a_sweep_keeps_no_password(web: ListingServer, tmp_path: Path) -> None:
    words = [*TINY_RUN, f"data.shards='{private(web, 'digits')}'", "sweep_dir=sweep", "total_steps=2"]
    words.append("model.patch_size=2")  # of which the demo has two
    shown = ditscale("train", "-m", "seed=0,1", *words, cwd=tmp_path)
    assert len(list(tmp_path.glob("sweep/*/config.yaml"))) == 2
    assert "data.shards=" in (tmp_path / "sweep/multirun.yaml").read_text()
    web.login = "somebody:else"
    shown += ditscale("train", "-m", "seed=2,3", "hydra.launcher.n_jobs=2", *words, cwd=tmp_path, expect=2)
    assert "manifest.json is refused" in shown
    assert_no_secret(shown, tmp_path)


def test_shards_and_references_of_private_images_keep_no_password(web: ListingServer, tmp_path: Path) -> None:
    source = ["data=folder", f"data.source.root='{private(web, 'images')}'", "data.name=animals", "data.image_size=16"]
    source += ["model/autoencoder=identity", "data.autoencoder.channels=3"]
    shown = ditscale("encode", *source, "data.shards=shards", cwd=tmp_path)
    shown += ditscale("verify", "data.shards=shards", *source, cwd=tmp_path)
    assert list((tmp_path / "shards").glob("*.tar"))
    assert_no_secret(shown, tmp_path)


ERRORS = [
    ("train", "data.shards", "There is no manifest.json in"),
    ("sample", "checkpoint", "has no complete checkpoint"),
    ("encode", "data.source.root", "There are no files in"),
    ("verify", "data.shards", "data.shards is http://***@"),
    ("train", "remote_dir", "but a run is kept behind gs:// or s3:// only"),
    ("train", "init_from", "has no complete checkpoint"),
    ("train", "replay", "is not a dump of a diverged run"),
    ("report", "sweep", "There is no sweep"),
]


def words_of(job: str, setting: str, web: ListingServer, digits: Path) -> list[str]:
    """Return a command line that fails for a private URL."""
    more = [*TINY_RUN, f"data.shards={digits}"] if job == "train" and setting != "data.shards" else []
    more += ["data/source=image_folder"] if job == "encode" else []
    url = private(web, "nowhere") + (f"?X-Amz-Signature={SIGNATURE}" if setting == "data.shards" else "")
    return [job, *more, f"{setting}='{url}'"]


@pytest.mark.parametrize(("job", "setting", "words"), ERRORS)
def test_sentences_show_no_password(
    job: str, setting: str, words: str, web: ListingServer, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    shown = in_process(*words_of(job, setting, web, digits), expect=2)
    assert words in shown
    assert "***@" in shown
    assert_no_secret(shown, tmp_path)


@pytest.mark.parametrize(("job", "setting", "words"), ERRORS[:2])
def test_tracebacks_show_no_password(
    job: str, setting: str, words: str, web: ListingServer, digits: Path, tmp_path: Path
) -> None:
    command = words_of(job, setting, web, digits)
    shown = ditscale(*command, cwd=tmp_path, expect=1, env={"HYDRA_FULL_ERROR": "1"})
    assert words in shown
    assert "Traceback" in shown
    assert_no_secret(shown, tmp_path)


def test_who_gives_a_url_out_of_a_config_is_told_that_its_password_is_not_in_it(
    web: ListingServer, tmp_path: Path
) -> None:
    train(web, cwd=tmp_path)
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["shards"]
    shown = ditscale("train", *TINY_RUN, f"data.shards='{kept}'", cwd=tmp_path, expect=2)
    assert "has *** where a password or key was: files store none; give the whole URL again" in shown


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_keys_in_the_url_of_a_bucket_are_refused_without_being_shown(
    protocol: str, tmp_path: Path, in_process: InProcess
) -> None:
    shown = in_process("train", *TINY_RUN, f"data.shards='{protocol}://{TYPED}@bucket/digits'", expect=2)
    assert f"{protocol}://***@bucket/digits/manifest.json has keys before its bucket, but those of" in shown
    assert_no_secret(shown, tmp_path)


def test_a_dump_keeps_no_password_and_is_replayed_with_the_url_given_again(
    web: ListingServer, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    poisoned(digits, web.folder / "poisoned", position=20)  # which the second step visits
    shards = f"data.shards='{private(web, 'poisoned')}'"
    shown = in_process("train", *TINY_RUN, shards, "run_dir=run", expect=1)
    assert "`ditscale train replay=run/nonfinite_00000002` shows what went wrong" in shown
    shown += in_process("train", "replay=run/nonfinite_00000002", expect=2)
    assert "/poisoned/manifest.json has *** where a password or key was" in shown
    shown += in_process("train", "replay=run/nonfinite_00000002", shards)
    assert "samples: 1 of 16 with a loss that is not finite" in shown
    assert_no_secret(shown, tmp_path)
