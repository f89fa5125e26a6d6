"""A Hub of one repository, served over HTTP on this machine: what huggingface_hub asks for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Served:
    """What is served, and what was asked.

    Args:
        folder: the repository's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.pushed: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve the files of a folder as ``org/name``, and take commits to any repository."""
    served = Served(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            served.asked.append((self.command, path))
            if path.startswith("/api/models/org/name"):
                names = sorted(p.name for p in served.folder.iterdir())
                info = {
                    "id": "org/name",
                    "modelId": "org/name",
                    "sha": COMMIT,
                    "siblings": [{"rfilename": n} for n in names],
                }
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
                return
            file = served.folder / path.rpartition("/")[2]
            if not path.startswith("/org/name/resolve/") or not file.is_file():
                self.answer(
                    404, b"", {"X-Error-Code": "EntryNotFound" if "/org/name/" in path else "RepoNotFound"}
                )
                return
            data = file.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            asked = self.headers.get("Range")
            if asked and self.command == "GET":
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = min(int(last or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                self.answer(206, data[int(first) : end + 1], headers)
                return
            self.answer(200, data, {**headers, "Content-Length": str(len(data))})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            served.asked.append((self.command, self.path))
            if self.path.endswith("/repos/create"):
                answer: object = {"url": f"{served.address}/me/result"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            else:
                for line in filter(None, body.splitlines()):
                    operation = json.loads(line)
                    if operation["key"] == "file":
                        served.pushed[operation["value"]["path"]] = operation["value"]["content"].encode()
                answer = {"commitUrl": f"{served.address}/me/result/commit/{COMMIT}", "commitOid": COMMIT}
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
