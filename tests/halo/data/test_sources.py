"""Of a source on the hub, only the sample is downloaded, and its name has the commit. A local server is the hub."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from halo.data.sources import fetch_source
from halo.errors import UserError

ROOT = Path(__file__).parents[3]
NAME, COMMIT = "someone/edu", "0123456789abcdef0123456789abcdef01234567"
FILES = {"sample/10BT/000_00000.parquet": b"ten", "data/CC-MAIN-2024-10/000.parquet": b"dump", "README.md": b"read"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == f"/api/datasets/{NAME}/revision/main":
            names = [{"rfilename": name} for name in FILES]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": names}).encode())
        elif (name := path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/")) in FILES:
            self._answer(FILES[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _fetch(cache: Path, endpoint: str, *arguments: str, offline: str = "0") -> tuple[str, str]:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    code = "import sys; from halo.data.sources import fetch_source; print(*fetch_source(*sys.argv[1:]), sep='\\n')"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def test_a_sample_is_downloaded_once(hub: str, tmp_path: Path) -> None:
    printed, errors = _fetch(tmp_path, hub, NAME)
    assert printed, errors
    folder, name = printed.splitlines()
    assert name == f"{NAME}@{COMMIT}/sample/10BT"
    assert [path.read_bytes() for path in Path(folder).iterdir()] == [b"ten"]
    assert _fetch(tmp_path, "http://127.0.0.1:1", NAME, offline="1")[0] == printed
    dump, _ = _fetch(tmp_path, hub, NAME, "CC-MAIN-2024-10")
    assert dump.splitlines()[1] == f"{NAME}@{COMMIT}/data/CC-MAIN-2024-10"


def test_what_is_not_there(hub: str, tmp_path: Path) -> None:
    assert "has no sample/350BT/*.parquet on the hub" in _fetch(tmp_path, hub, NAME, "sample-350BT")[1]
    message = "someone/else is not a path here, and cannot be fetched from the hub"
    assert message in _fetch(tmp_path, hub, "someone/else")[1]


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert fetch_source(str(tmp_path)) == (tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="leave --sample out"):
        fetch_source(str(tmp_path), "sample-10BT")
