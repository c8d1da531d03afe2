"""A Hugging Face hub on 127.0.0.1, with what a download asks for, and the cache it fills."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "org/tiny-7B.v1"

API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(/(?P<kind>revision|tree)/(?P<rev>.+))?")
FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        models: repository -> its files, name to contents; all on the branch main.
        refused: repository -> (status, the hub's name of the error) with which it answers instead.
        requests: method and path of each request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.models: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        """The commit of main, which follows from the files."""
        listing = sorted((name, data) for name, data in self.models[repository].items())
        return hashlib.sha1(repr(listing).encode()).hexdigest()

    def sent(self) -> set[str]:
        """Names of the files that were downloaded."""
        paths = (FILE.fullmatch(r.removeprefix("GET ")) for r in self.requests)
        return {match["name"] for match in paths if match}


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        match = API.fullmatch(path) or FILE.fullmatch(path)
        repository = match["repository"] if match else ""
        if repository in self.server.refused:
            status, code = self.server.refused[repository]
            return self._send(b"", status, {"X-Error-Code": code})
        if repository not in self.server.models:
            return self._send(b"", 401, {"X-Error-Code": "RepoNotFound"})
        files, commit = self.server.models[repository], self.server.commit(repository)
        if match["rev"] not in (None, "main", commit):
            return self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        if match.re is FILE:
            data = files[match["name"]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(data, 200, {"ETag": etag, "X-Repo-Commit": commit})
        if match["kind"] == "tree":
            answer = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for n, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repository, "sha": commit, "siblings": siblings}
        return self._send(json.dumps(answer).encode(), 200, {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is no access log."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub as long as the context lasts."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def repository_cache(cache: Path) -> Path:
    """The folder of the cache for the model NAME."""
    return cache / f"models--{NAME.replace('/', '--')}"


def write_snapshot(cache: Path, files: dict[str, bytes], commit: str = "a" * 40) -> Path:
    """Write a snapshot of NAME as huggingface_hub keeps it: links to blobs, a commit named by main.

    Args:
        cache: the hub cache.
        files: name to contents.
        commit: which main names.

    Returns:
        The folder of the snapshot.
    """
    home = repository_cache(cache)
    snapshot = home / "snapshots" / commit
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    for number, (file, data) in enumerate(files.items()):
        (home / "blobs" / str(number)).write_bytes(data)
        (snapshot / file).symlink_to(Path("../../blobs") / str(number))
    return snapshot
