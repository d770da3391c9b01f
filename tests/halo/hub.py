"""A hub on this machine: a server of folders, as huggingface_hub asks for them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            owner, model, *asked = path.removeprefix("api/models/").split("/")
            self._api(f"{owner}/{model}", asked, with_body)
            return
        owner, model, _resolve, _revision, *file = path.split("/")
        source = self.server.folder / owner / model / "/".join(file)
        if f"{owner}/{model}" in self.server.gated:
            self._send(403, b"Access is restricted.", {"X-Error-Code": "GatedRepo"}, with_body)
        elif not source.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        else:
            content = source.read_bytes()
            if with_body:
                self.server.fetched.append("/".join(file))
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}, with_body)

    def _api(self, name: str, asked: list[str], with_body: bool) -> None:
        folder = self.server.folder / name
        if not folder.is_dir():
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, with_body)
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if asked[:1] == ["tree"]:
            inside = "/".join(asked[2:])
            listed = [
                {"type": "file", "path": n, "oid": n, "size": f.stat().st_size}
                for n, f in zip(names, files, strict=True)
                if n.startswith(inside)
            ]
            self._send(200, json.dumps(listed).encode(), {}, with_body)
        else:
            siblings = [{"rfilename": name} for name in names]
            model = {"_id": name, "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(model).encode(), {}, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    folder: Path
    fetched: list[str]
    gated: set[str]


@contextmanager
def hub(folder: Path, gated: set[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder`/<owner>/<model>. Yields its address, and a list to which each file that is fetched is added."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.fetched, server.gated = folder, [], set(gated)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
