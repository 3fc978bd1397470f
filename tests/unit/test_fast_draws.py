"""Compiled draws are bit for bit those of numpy, for any stream, length and number of threads."""

import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import core.draws
from core.deferred import Deferred
from core.draws import Philox, Purpose, TimesOfWords, draw_noise, training_draws
from core.fast_draws import CompiledDraws, load_draws
from core.rooms import MAY_IMPORT
from core.ziggurat import R, tables
from diffusion.times import LogitNormalTimes, LogNormalLevels, MovedTimes, UniformSteps, UniformTimes

LARGEST = 2**63 - 1


@pytest.fixture(scope="module")
def compiled() -> CompiledDraws:
    return load_draws()


def numpys(seed: int, position: int, purpose: int, draw: int, length: int) -> np.ndarray:
    counter = np.array([0, position, purpose, draw], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter))
    return generator.standard_normal(length, dtype=np.float32)


def bits(values: np.ndarray) -> list[int]:
    return np.ascontiguousarray(values).view(np.uint32).tolist()


def drawn(compiled: CompiledDraws, positions: list[int], stream: tuple[int, int, int], length: int) -> np.ndarray:
    out = np.full((len(positions), length), np.nan, np.float32)
    compiled.normals(*stream).write(out, np.array(positions, np.int64))
    return out


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, LARGEST),
    position=st.integers(0, LARGEST),
    purpose=st.integers(0, LARGEST),
    draw=st.integers(0, LARGEST),
    length=st.integers(0, 3000),
)
def test_normals_are_those_of_numpy(
    compiled: CompiledDraws, seed: int, position: int, purpose: int, draw: int, length: int
) -> None:
    (found,) = drawn(compiled, [position], (seed, purpose, draw), length)
    assert bits(found) == bits(numpys(seed, position, purpose, draw, length))


def test_a_million_normals_with_hundreds_in_the_tail_are_those_of_numpy(compiled: CompiledDraws) -> None:
    found = drawn(compiled, list(range(256)), (7, 2, 0), 4099)
    expected = np.stack([numpys(7, position, 2, 0, 4099) for position in range(256)])
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert min((found > R).sum(), (found < -R).sum()) > 100


@pytest.mark.parametrize("spare", [0, 8, -4000])
def test_normals_that_take_more_bits_than_are_made_at_once_are_those_of_numpy(
    compiled: CompiledDraws, spare: int
) -> None:
    out, (_, key, table) = np.empty((3, 4096), np.float32), compiled.normals(1, 2, 3)
    import_module("core.compiled_draws").fill_with_spare(out, np.arange(3), key, table, spare)
    for position, row in enumerate(out):
        assert bits(row) == bits(numpys(1, position, 2, 3, 4096))


CONTINUOUS = [
    UniformTimes(),
    LogitNormalTimes(0.3, 1.5),
    LogNormalLevels(),
    *(MovedTimes(times, 3.0, 1e-3, 1 - 1e-3) for times in (UniformTimes(), LogitNormalTimes())),
]


@pytest.mark.parametrize("times", [*CONTINUOUS, *(UniformSteps(count) for count in (1, 7, 1000, 2**31 + 1))])
def test_times_of_words_are_those_that_are_drawn_one_by_one(times: TimesOfWords) -> None:
    """Include a number of steps for which numpy rejects half of its random bits."""
    philox, positions = Philox(3), np.arange(2000)
    t, undecided = times.of_words(philox.first_words(positions, Purpose.TIMESTEP))
    one_by_one = [times.draw(philox.at(position, Purpose.TIMESTEP)) for position in range(2000)]
    assert t[~undecided].tolist() == np.array(one_by_one, dtype=times.dtype)[~undecided].tolist()
    assert undecided.mean() < (0.6 if getattr(times, "num_steps", 1) > 2**31 else 0.01)


def test_draws_of_training_are_the_same_compiled_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, shape = np.arange(2**40, 2**40 + 13), (4, 9, 5)
    for times in (UniformSteps(2**31 + 1), MovedTimes(UniformSteps(7), 2.0, 0.0, 1.0), *CONTINUOUS):
        monkeypatch.setattr(core.draws, "FAST_DRAWS", Deferred("draws", load_draws, worth=10**9))
        slow = training_draws(Philox(5), positions, shape, times, 0.5, True)
        monkeypatch.setattr(core.draws, "FAST_DRAWS", Deferred("draws", load_draws, worth=0))
        assert core.draws.FAST_DRAWS.get(0) is not None
        fast = training_draws(Philox(5), positions, shape, times, 0.5, True)
        for one, two in zip(slow, fast, strict=True):
            assert (one.dtype, one.tobytes()) == (two.dtype, two.tobytes())


def test_no_samples_have_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.draws, "FAST_DRAWS", Deferred("draws", load_draws, worth=0))
    assert draw_noise(Philox(0), np.arange(0), 0, (4, 2, 2), Purpose.NOISE).shape == (0, 4, 2, 2)


def test_they_are_loaded_only_where_a_job_draws_many(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(core.draws, "FAST_DRAWS", Deferred("draws", lambda: loaded.append(load_draws()), worth=100))
    philox = Philox(0)
    draw_noise(philox, np.arange(2), 0, (1, 7, 7), Purpose.NOISE)
    assert not loaded
    draw_noise(philox, np.arange(2), 0, (1, 7, 7), Purpose.NOISE)
    assert len(loaded) == 1
    draw_noise(philox, np.arange(9), 0, (1, 7, 7), Purpose.NOISE)
    assert len(loaded) == 1


def test_without_numba_numpy_draws_the_same_and_one_note_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "core.compiled_draws", raising=False)
    monkeypatch.delitem(sys.modules, "core.numba_functions", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(core.draws, "FAST_DRAWS", Deferred("draws", load_draws, worth=0))
    for _ in range(2):
        found = draw_noise(Philox(7), np.array([41]), 2, (1, 2, 3), Purpose.NOISE)
        assert bits(found.ravel()) == bits(numpys(7, 41, Purpose.NOISE, 2, 6))
    shown = capsys.readouterr().out
    assert shown.startswith("note: draws are not compiled, and several times slower: ")
    assert shown.count("\n") == 1


def test_compiled_draws_that_differ_are_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Change one of the tables, as a machine would on which an operation rounds otherwise."""
    widths = np.nextafter(tables().widths, np.float32(1))
    monkeypatch.setattr("core.fast_draws.tables", lambda: tables()._replace(widths=widths))
    assert Deferred("draws", load_draws, worth=0).get(1) is None
    assert "slower: they differ from numpy's on this machine." in capsys.readouterr().out


def test_no_file_imports_numba_except_those_that_are_loaded_where_it_pays() -> None:
    """Importing numba takes half a second, which no job that draws little should wait for."""
    importers = re.compile(
        r"^\s*(?:import|from) (?:numba|llvmlite|core\.(?:compiled_\w+|numba_functions))\b", re.MULTILINE
    )
    root = Path(core.draws.__file__).parent.parent
    found = {
        f"{room}/{path.relative_to(root / room)}"
        for room in MAY_IMPORT
        for path in (root / room).rglob("*.py")
        if importers.search(path.read_text())
    }
    compiled = {
        "core/compiled_draws.py",
        "core/compiled_latents.py",
        "core/compiled_philox32.py",
        "core/compiled_reads.py",
        "core/compiled_samples.py",
    }
    assert found == {*compiled, "core/numba_functions.py"}
