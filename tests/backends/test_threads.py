"""Pieces that are shared out to threads, and items that are written while the next ones are
made."""

import threading
from collections.abc import Iterator

import pytest
import torch

from et_moe.backends.threads import worker_threads, write_behind


def test_workers_run_operators_alone_and_change_nothing_after() -> None:
    def seen_by_a_new_thread() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return seen[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with worker_threads() as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
        assert (torch.get_num_threads(), seen_by_a_new_thread()) == (3, 3)
        with pytest.raises(KeyError), worker_threads() as pool:
            list(pool.map({}.__getitem__, "a"))
        assert (torch.get_num_threads(), seen_by_a_new_thread()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_an_item_is_written_while_the_next_is_made() -> None:
    made, written = [threading.Event() for _ in range(3)], []

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            assert len(written) >= i - 1  # at most two items are in memory
            event.set()
            yield i

    def write(item: int) -> None:
        assert item + 1 == len(made) or made[item + 1].wait(60)
        written.append(item)

    write_behind(items(), write)
    assert written == [0, 1, 2]
    write_behind([], write)


def test_errors_are_raised_as_they_are() -> None:
    written: list[int] = []

    def failing_items() -> Iterator[int]:
        yield from range(2)
        raise KeyError("made")

    def failing_write(item: int) -> None:
        if item == 1:
            raise OSError("written")
        written.append(item)

    with pytest.raises(KeyError, match="made"):
        write_behind(failing_items(), written.append)
    assert written == [0, 1]
    written.clear()
    with pytest.raises(OSError, match="written"):
        write_behind(range(5), failing_write)
    assert written == [0]
    with pytest.raises(OSError, match="written"):
        write_behind(range(2), failing_write)  # an error is raised for the last item, too
