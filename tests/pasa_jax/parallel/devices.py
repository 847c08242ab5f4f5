"""Eight devices: tests that need them run in a second process, in which jax starts with eight.

One such process serves all tests of a pytest process, so that they share what is imported and
compiled.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import pytest

COUNT = 8
_FLAG = "--xla_force_host_platform_device_count"


def on_devices(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run where there are eight devices. Its arguments must pickle."""

    @functools.wraps(test)
    def sent(**arguments: Any) -> None:
        failure = _server().ask(test.__module__, test.__qualname__, arguments)
        if failure is not None:
            pytest.fail(failure, pytrace=False)

    sent.here = test  # pyright: ignore[reportFunctionMemberAccess]
    return sent


class _Server:
    def __init__(self) -> None:
        env = {**os.environ, "XLA_FLAGS": f"{_FLAG}={COUNT}", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", __name__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self.stop)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, *question: Any) -> str | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


@functools.cache
def _server() -> _Server:
    return _Server()


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Runs the tests that are asked for; answers None, or how one failed."""
    while True:
        try:
            module, name, arguments = pickle.load(questions)
        except EOFError:
            return
        try:
            test: Any = importlib.import_module(module)
            for part in name.split("."):
                test = getattr(test, part)
            test.here(**arguments)
            answer = None
        except BaseException:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # what a test prints is no answer
    os.dup2(sys.stderr.fileno(), 1)
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    serve(sys.stdin.buffer, output)
