"""Work on rows is divided between threads, and is over when the call is."""

import time

import pytest

from core.threads import Threads


@pytest.mark.parametrize("failing", [0, 4])
def test_an_error_is_raised_only_when_no_thread_works_on_the_rows_any_more(failing: int) -> None:
    """Fail in the caller's thread or another. Else shards would be closed under the rest, and memory given back."""
    done = []

    def work(rows: slice) -> None:
        if rows.start == failing:
            raise OSError("disk gone")
        time.sleep(0.2)
        done.append(rows.start)

    with pytest.raises(OSError, match="disk gone"):
        Threads(3).over_rows(12, work)
    assert sorted(done) == sorted({0, 4, 8} - {failing})


@pytest.mark.parametrize(("num_rows", "threads"), [(0, 3), (1, 3), (7, 3), (12, 1)])
def test_each_row_is_worked_on_once(num_rows: int, threads: int) -> None:
    done: list[int] = []
    Threads(threads).over_rows(num_rows, lambda rows: done.extend(range(rows.start, rows.stop)))
    assert sorted(done) == list(range(num_rows))
