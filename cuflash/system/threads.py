"""Work for several threads, of which there may be fewer than wanted: a container that limits process ids refuses to start more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results_of(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Call a function for each item in up to `workers` threads; yields items with their results as they come.

    Raises:
        what the function raised first; items that were not begun then never are, and those that were are waited for.
    """
    todo = iter(items)
    lock = threading.Lock()
    stopped = threading.Event()
    done: queue.SimpleQueue[tuple[Item, Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                item = next(todo, None)
            if item is None:
                return
            try:
                done.put((item, function(item), None))
            except BaseException as error:
                done.put((item, None, error))

    threads = _start(work, min(workers, len(items)))
    if not threads:
        yield from ((item, function(item)) for item in items)
        return
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]  # None only if the function gives it
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _start(work: Callable[[], None], count: int) -> list[threading.Thread]:
    """As many threads as can be started."""
    threads = []
    for _ in range(count):
        thread = threading.Thread(target=work, name="cuflash-worker")
        try:
            thread.start()
        except RuntimeError:  # can't start new thread
            break
        threads.append(thread)
    return threads
