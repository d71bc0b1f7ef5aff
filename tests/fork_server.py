"""Start test processes as forks of a single-threaded server that has already imported everything.

Tests pay for the imports once, and the process that runs the tests, which may have threads, is never forked.
`python` runs a command of the kind `python -m NAME` in such a process: everything but what the imports themselves do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import forks
from ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fork_server_imports"])

# Libraries that start threads when they are imported: OpenBLAS's pool, pyarrow's jemalloc.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def start(target: Callable[..., None], *args: Any) -> Any:
    """Start a process that calls `target(*args)` with this process's environment, working directory and output.

    Args:
        target: an importable function; the new process does not see changes that this one made to modules.
    """
    given = (dict(os.environ), os.getcwd(), _Descriptor(1), _Descriptor(2), target, args)
    process = CONTEXT.Process(target=_begin, args=given)
    with _environment(ONE_THREAD):
        process.start()
    return process


class Interpreter:
    """A process that runs `python WORDS...` with `-m NAME`, `-c CODE` or a script, without its imports' time."""

    def __init__(
        self,
        *words: object,
        output: Sequence[Path],
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        given: Path = Path(os.devnull),
    ) -> None:
        """Start the process.

        Args:
            output: file of its standard output and error, or one of each. Replaced.
            cwd: working directory; by default this process's.
            environment: all its variables; by default this process's. PYTHONPATH is followed.
            given: file of its standard input.
        """
        self.command = [str(word) for word in words]
        files = [str(given), str(output[0]), str(output[-1])]
        for file in output:
            file.write_bytes(b"")
        self.process = start(_interpret, self.command, files, str(cwd or Path.cwd()), dict(environment or os.environ))
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode


def python(
    *words: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    given: str = "",
    timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Run an `Interpreter` to its end, with the text `given` as its standard input.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    with TemporaryDirectory() as folder:
        taken, out, err = (Path(folder) / name for name in ("in", "out", "err"))
        taken.write_text(given)
        process = Interpreter(*words, output=(out, err), cwd=cwd, environment=environment, given=taken)
        try:
            code = process.wait(timeout)
        finally:
            process.process.kill()
            process.process.join()
        return subprocess.CompletedProcess(process.command, code, out.read_text(), err.read_text())


def job(*words: object, world: int, log: Path, cwd: Path) -> list[Interpreter]:
    """Start `world` ranks of a command as torchrun does. Rank 0 writes to `log`, the others beside it."""
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Interpreter(
            *words,
            output=[log.with_suffix(f".{rank}") if rank else log],
            cwd=cwd,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def _interpret(command: list[str], files: list[str], cwd: str, environment: dict[str, str]) -> None:
    """In a process of its own: become the interpreter of a command line. Ends with the command's exit code."""
    for number, file in enumerate(files):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *rest = command if command[0] in ("-m", "-c") else ("", *command)
    sys.argv = [rest[0] if kind != "-c" else "-c", *rest[1:]]
    sys.path[:0] = [str(Path(rest[0]).parent.resolve()) if not kind else cwd, *paths]
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(rest[0], run_name="__main__")
    finally:
        sys.stdout.flush()


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the server process, which starts together with the first child."""
    before = dict(os.environ)
    os.environ.update(more, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Descriptor:
    """A file descriptor of this process to hand to the child."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._number),)


def _received(descriptor: Any) -> int:
    return int(descriptor.detach())


def _begin(
    environment: dict[str, str], folder: str, out: int, err: int, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    for stream, number in ((1, out), (2, err)):
        os.dup2(number, stream)
        os.close(number)
    if "fork_server_imports" not in sys.modules:
        raise RuntimeError("the fork server could not import what tests need: see tests/fork_server_imports.py")
    if unsafe := forks.unsafe():
        raise RuntimeError(f"the fork server must have one thread when it forks: {unsafe[0]}")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*args)
