"""Starts commands as forks of a process that has imported their libraries.

Imports take most of the time of the tests' small commands. A fork is a process with a session, a folder and an
environment of its own; it can be killed, and the interpreter ends it as usual. Forks of one server share the seed of
Python's string hashes: tests that compare two processes start one of them without the server.
"""

import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
_LIBRARIES = (
    *(
        "git",
        "torch",
        "mlflow.pyfunc",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.store.model_registry.sqlalchemy_store",
    ),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.dates", "optuna.storages", "tqdm"),
)
ENVIRONMENT = dict(os.environ)
"""The environment in which pytest and the server were started; libraries add variables to pytest's own."""
_OWN = (
    *("CAPEXP_", "MLFLOW_", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "TORCH_HOME"),
    *("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_"),  # of torchrun
)
"""The beginnings of the environment variables in which a command may differ from the server."""


class Fork:
    """A command that runs in a fork, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, words: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        """Start ``python -m`` with these words, in a session of its own."""
        ends = [os.pipe() for _ in range(3)]
        try:
            self.pid = _ask({"words": words, "folder": str(folder), "environment": environment}, [w for _, w in ends])
        finally:
            for _, end in ends:
                os.close(end)
        self.stdout, self.stderr, self._status = (os.fdopen(read) for read, _ in ends)
        self.returncode: int | Any = None
        self._readers: list[threading.Thread] = []
        self._read: dict[IO[str], str] = {}

    def poll(self) -> int | None:
        """Return the exit status, the negative signal of a killed process, or None for one that runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what the process wrote to its standard output and error until it ended."""
        if not self._readers:
            for pipe in (self.stdout, self.stderr):
                self._readers.append(threading.Thread(target=self._read_all, args=(pipe,), daemon=True))
                self._readers[-1].start()
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():  # the process has left one behind that holds the pipe
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._read[self.stdout], self._read[self.stderr]

    def _read_all(self, pipe: IO[str]) -> None:
        with pipe:
            self._read[pipe] = pipe.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            with self._status:
                self.returncode = int(self._status.read())
        return self.returncode


def can_fork(arguments: tuple[str, ...], environment: dict[str, str]) -> bool:
    """Return whether a fork of the server can run the command: its imports do not depend on what is different."""
    names = {name for name in {*environment, *ENVIRONMENT} if environment.get(name) != ENVIRONMENT.get(name)}
    return (
        arguments[:2] == (sys.executable, "-m")
        and arguments[2].startswith("capexp.")
        and environment.get("OMP_NUM_THREADS") == "1"  # a process that has started threads cannot be forked
        and environment.get("PYTHONPATH") == str(ROOT)
        and all(name.startswith(_OWN) for name in names)
    )


_lock = threading.Lock()


def _ask(request: dict[str, object], handles: list[int]) -> int:
    """Have the server fork; return the process id."""
    with _lock:
        connection, _ = _server()
        socket.send_fds(connection, [json.dumps(request).encode()], handles)
        return int(connection.recv(32))


@cache
def _server() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Start the server, which ends when this process does; its standard output is a pipe, as that of its forks."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # No threads, which a fork would lack: neither torch's nor those of the allocator that PyArrow brings.
    threads = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    # Read when MLflow is imported; commands set it before.
    own = {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | threads | own
    with its:
        process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    assert ours.recv(32) == b"ready", f"the fork server has ended with {process.wait()}"
    return ours, process


def _import_all() -> None:
    """Import what the commands import, but not the commands themselves: these run as ``__main__``."""
    import capexp

    for name in _LIBRARIES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(capexp.__path__, "capexp."):
        if module.name == "capexp.report.page":  # needs Streamlit, which may be missing
            continue
        if module.name.count(".") > 1 or module.name in ("capexp.cli", "capexp.experiment"):
            importlib.import_module(module.name)
    from sqlalchemy.orm import configure_mappers

    configure_mappers()


def _warm_up() -> None:
    """Have the libraries make what they make once in a process: validators, fonts, names of columns, queries."""
    from capexp.experiment import find_experiment, load_experiment

    load_experiment(find_experiment("scenes"), {})
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot(xlabel="1", ylabel="2", title="3")
    axes.plot([1, 2], label="4")
    axes.legend()
    figure.savefig(io.BytesIO())
    from mlflow.entities import Dataset, DatasetInput, LoggedModelOutput, Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        experiment = client.create_experiment("warm", f"{folder}/artifacts")
        run_id = client.create_run(experiment).info.run_id
        client.log_batch(run_id, [Metric("a", 1.0, 0, 0)], [Param("b", "c")], [RunTag("d", "e")])
        client.log_inputs(run_id, [DatasetInput(Dataset("a", "b", "local", "{}"))])
        model_id = client.create_logged_model(experiment, source_run_id=run_id).model_id
        client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
        client.create_registered_model("a")
        version = client.create_model_version("a", f"{folder}/artifacts", run_id, model_id=model_id).version
        client.set_model_version_tag("a", version, "b", "c")
        client.set_registered_model_alias("a", "champion", version)
        client.search_model_versions("name='a'")
        client.set_terminated(run_id)
        client.search_runs([experiment])


def _serve(connection: socket.socket) -> list[str]:
    """Fork for each request and report the forks' exit statuses; return the words of the command in a fork."""
    running: dict[int, tuple[int, int]] = {}  # of pidfd: process id, pipe for the status
    requests = connection.fileno()
    connection.send(b"ready")
    while True:
        for ready in select.select([requests, *running], [], [])[0]:
            if ready != requests:
                pid, pipe = running.pop(ready)
                with suppress(BrokenPipeError):  # nobody waits for it
                    os.write(pipe, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                os.close(pipe)
                os.close(ready)
                continue
            message, handles, _, _ = socket.recv_fds(connection, 2**20, 3)
            if not message:
                sys.exit()
            out, err, status = handles
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.dup2(out, 1)
                os.dup2(err, 2)
                connection.close()
                for handle in {*handles, *running, *(pipe for _, pipe in running.values())}:
                    os.close(handle)
                request = json.loads(message)
                os.chdir(request["folder"])
                os.environ.clear()
                os.environ.update(request["environment"])
                sys.path[0] = request["folder"]
                return list(request["words"])
            os.close(out)
            os.close(err)
            running[os.pidfd_open(pid)] = pid, status
            connection.send(str(pid).encode())


if __name__ == "__main__":
    _import_all()
    _warm_up()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has started a thread"
    gc.freeze()
    module, *sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
