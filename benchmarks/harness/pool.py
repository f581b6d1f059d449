"""Tasks in worker processes: one that fails, hangs or dies costs one task, and a deadline leaves the rest out."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

LEFT_OUT = "left out: no time"
#: After these the process's context is of no more use.
FATAL = ("CUDA error", "AcceleratorError", "device-side assert", "illegal memory access")

Result = dict[str, Any]


def run_tasks(
    function: Callable[[Any], Result], tasks: Sequence[Any], jobs: int, deadline: float, patience: float = 240
) -> Iterator[tuple[Any, Result]]:
    """Yield (task, result) as they end; the result of a failed or omitted task is ``{"status": why}``.

    Args:
        function: called with a task; importable by name.
        tasks: begun in this order.
        jobs: how many worker processes; 0 runs the tasks in this process.
        deadline: seconds since the epoch. A task is not begun where the mean of those that ended would not fit, and
            what still runs then is ended.
        patience: seconds after which a task is given up.
    """
    if not jobs:
        yield from _here(function, tasks, deadline)
        return
    waiting, times, mean = list(tasks), [], 0.0
    workers = [_Worker(function) for _ in range(min(jobs, len(tasks)))]
    try:
        while waiting or any(w.task is not None for w in workers):
            mean = sum(times) / len(times) if times else 0.0
            for worker in workers:
                if worker.task is None and waiting and time.time() + mean < deadline:
                    worker.begin(waiting.pop(0))
            busy = [w for w in workers if w.task is not None]
            if not busy:
                break
            ready = wait([w.connection for w in busy], timeout=0.5)
            for worker in busy:
                result = None
                late = time.time() - worker.since
                if worker.connection in ready:
                    result = worker.receive()
                elif time.time() > deadline:
                    result = {"status": f"{LEFT_OUT}, ended after {late:.0f} s"}
                elif late > patience:
                    result = {"status": f"error: the process was ended after {late:.0f} s"}
                if result is None:
                    continue
                task, worker.task = worker.task, None
                if result.get("status", "ok") == "ok":
                    times.append(late)
                if worker.connection not in ready:
                    worker.finished = True
                if worker.finished and waiting:
                    worker.restart()
                yield task, result
        for task in waiting:
            yield task, {"status": LEFT_OUT}
    finally:
        for worker in workers:
            worker.end()


def describe(error: BaseException) -> str:
    """An exception in a cell of a table."""
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _here(function: Callable[[Any], Result], tasks: Sequence[Any], deadline: float) -> Iterator[tuple[Any, Result]]:
    times: list[float] = []
    for task in tasks:
        start = time.time()
        if start + (sum(times) / len(times) if times else 0.0) >= deadline:
            yield task, {"status": LEFT_OUT}
            continue
        try:
            result = function(task)
            times.append(time.time() - start)
        except Exception as error:
            result = {"status": describe(error)}
        yield task, result


def _serve(function: Callable[[Any], Result], connection: Connection) -> None:
    """The worker process: tasks in, results out, until there is none."""
    while (task := connection.recv()) is not None:
        try:
            result = function(task[0])
        except Exception as error:
            result = {"status": describe(error)}
        result["fatal"] = any(text in str(result.get("status", "")) for text in FATAL)
        connection.send(result)


class _Worker:
    """A process and its pipe."""

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self.function = function
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.function, theirs), daemon=False)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.since, self.finished = 0.0, False

    def begin(self, task: Any) -> None:
        self.task, self.since = task, time.time()
        try:
            self.connection.send((task,))
        except OSError:  # it is gone; receive() will say so
            self.finished = True

    def receive(self) -> Result:
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            self.finished = True
            return {"status": f"error: the process ended with code {self.process.exitcode}"}
        self.finished = result.pop("fatal", False)
        return result

    def restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        if self.task is None and not self.finished:
            try:
                self.connection.send(None)
                self.process.join(5)
            except OSError:
                pass
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
