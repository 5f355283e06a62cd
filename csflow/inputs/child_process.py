"""A child process that runs calls which may kill their process, such as native parsers on hostile bytes.

It is no process of `multiprocessing`, which would run the main script of the caller once more in the child.
"""

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
C = TypeVar("C")
T = TypeVar("T")

THREADS = 16
LONGEST_CALL_S = 300.0
"""Seconds after which a call counts as hanging, and its process is killed."""


class ChildDied(Exception):
    """The child process died, or was killed since a call did not end, before it had an answer."""


class Child:
    """Runs functions of modules in a child process, up to `THREADS` at once. Threads may share it.

    Args:
        context: the first argument of every call, which is sent only once.
    """

    def __init__(self, context: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for the parent, which then ends this one
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._numbers = count()
        self._answers: dict[int, Future[Any]] = {}
        self._is_dead = False
        self._connection.send(context)
        threading.Thread(target=self._receive, daemon=True, name="child-process").start()

    def call(self, function: Callable[Concatenate[C, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `function(context, …)`; raises what it raises, or ChildDied."""
        answer: Future[T] = Future()
        with self._lock:
            if self._is_dead:
                raise ChildDied
            number = next(self._numbers)
            self._answers[number] = answer
            try:
                self._connection.send((number, function, args, kwargs))
            except OSError:
                raise ChildDied from None
        try:
            return answer.result(LONGEST_CALL_S)
        except FutureTimeoutError:
            self.close()
            raise ChildDied from None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _receive(self) -> None:
        try:
            while True:
                number, is_result, value = self._connection.recv()
                answer = self._answers.pop(number)
                if is_result:
                    answer.set_result(value)
                else:
                    answer.set_exception(value)
        except (EOFError, OSError):
            with self._lock:
                self._is_dead = True
        for answer in self._answers.values():
            answer.set_exception(ChildDied())
        self._process.wait()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """Answers calls until the parent is gone."""
    context = connection.recv()
    lock = threading.Lock()

    def answer(number: int, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            message = (number, True, function(context, *args, **kwargs))
        except Exception as error:
            message = (number, False, error)
        with lock:
            connection.send(message)

    pool = ThreadPoolExecutor(THREADS)
    try:
        while True:
            pool.submit(answer, *connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(int(sys.argv[1])))
