"""A real MLflow server that can be stopped and started, and a proxy in front of it that can be slow or fail."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from user_folder import Folder, wait_for, write_store

from capexp.tracking.store import database_uri


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """``mlflow server`` on a folder: started again, it has what it had, at the same address."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        """``store`` is the URI of an existing database; without it there is an empty one in the folder."""
        folder.mkdir()
        self.folder, self._store = folder, store
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        if self._store is None:
            self._store = database_uri(self.folder / "server.db")
            self.clear()
        with (self.folder / "server.log").open("a") as log:
            process = self._process = subprocess.Popen(
                ["mlflow", "server", "--backend-store-uri", self._store, "--workers", "1",
                 "--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1",
                 "--port", str(self.port)],
                cwd=self.folder, env=Folder(self.folder).environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

        def up() -> bool:
            assert process.poll() is None, (self.folder / "server.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        wait_for(up)

    def clear(self) -> None:
        """Empty the database in the folder, also while the server runs: to start one takes longer than that."""
        write_store(self.folder / "server.db", "mlflow-artifacts:")
        shutil.rmtree(self.folder / "artifacts", ignore_errors=True)

    def stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(300)
            self._process = None


class Proxy:
    """Passes requests on to a server, after ``delay`` seconds; ``is_away`` answers as if there was no server, ``fails``
    answers 500 instead, and ``loses`` the answer to the first request of each kind that changes something, after it has
    done its work."""

    def __init__(self, server: Server) -> None:
        self.delay, self.is_away, self.fails, self.loses = 0.0, False, False, False
        self.lost: set[tuple[str, str]] = set()
        self.failed = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = self.read_chunks()
                time.sleep(proxy.delay)
                if proxy.is_away:
                    self.answer(502, b"no server")
                    return
                if proxy.fails:
                    proxy.failed += 1
                    self.answer(500, b"the server is unwell")
                    return
                headers = {k: v for k, v in self.headers.items() if k not in ("Host", "Transfer-Encoding")}
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
                    answer = connection.getresponse()
                    content = answer.read()
                except OSError:
                    self.answer(502, b"no server")
                    return
                finally:
                    connection.close()
                kind = (self.command, self.path.partition("artifacts/")[0].partition("?")[0])
                if proxy.loses and self.command != "GET" and "search" not in self.path and kind not in proxy.lost:
                    proxy.lost.add(kind)
                    self.answer(500, b"the answer was lost")
                    return
                self.answer(answer.status, content, answer.headers.get("Content-Type", "application/json"))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815

            def read_chunks(self) -> bytes:
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def answer(self, status: int, content: bytes, kind: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._httpd.server_port}"
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
