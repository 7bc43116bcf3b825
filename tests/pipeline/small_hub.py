"""A Hugging Face hub on loopback that serves one repository from a folder, and keeps a log."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server knows.

    Attributes:
        folder: where the repository's files are. name: ORG/NAME. token: what requests must carry.
        cut: names of files whose first answer ends after half of its bytes.
        sent: (name, first byte) of every answer with a file's bytes.
    """

    folder: Path
    name: str
    token: str
    cut: set[str] = field(default_factory=set)
    sent: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _json(self, value: object, status: int = 200, **headers: str) -> None:
            self._bytes(json.dumps(value).encode(), status, headers)

        def _bytes(self, data: bytes, status: int, headers: dict, body: bool = True) -> None:
            self.send_response(status)
            for key, content in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(key.replace("_", "-"), content)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            if self.headers.get("authorization") != f"Bearer {hub.token}":
                return self._json({}, 401, X_Error_Message="Invalid credentials")
            if path.startswith(f"/api/models/{hub.name}/tree/"):
                return self._json([self._entry(file) for file in hub.files()])
            if path.startswith(f"/api/models/{hub.name}"):
                siblings = [{"rfilename": file.name} for file in hub.files()]
                return self._json({"id": hub.name, "sha": COMMIT, "siblings": siblings})
            file = hub.folder / path.rpartition("/")[2]
            if not path.startswith(f"/{hub.name}/resolve/") or not file.is_file():
                return self._json({}, 404, X_Error_Code="RepoNotFound")
            return self._file(file, body)

        def _entry(self, file: Path) -> dict:
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

        def _file(self, file: Path, body: bool) -> None:
            whole = file.read_bytes()
            first = int(self.headers.get("range", "bytes=0-")[6:].split("-")[0])
            data = whole[first:]
            headers = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
            if body:
                hub.sent.append((file.name, first))
            if body and file.name in hub.cut:
                hub.cut.remove(file.name)
                headers["Content-Length"] = str(len(data))
                self._bytes(data[: len(data) // 2], 200, headers)
                self.close_connection = True
                return
            self._bytes(data, 206 if first else 200, headers, body)

    return Handler


@contextmanager
def serve(folder: Path, name: str, token: str, cut: set[str] = frozenset()) -> Iterator[Hub]:
    """Serves the files of a folder under ORG/NAME to requests with a token while in the block."""
    hub = Hub(folder, name, token, set(cut))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
