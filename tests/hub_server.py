"""As much of the Hub as publishing and loading a model needs, on the loopback interface, for the real huggingface_hub client.

Repositories are kept in memory: a commit is a mapping from path to content, a branch, tag or pull request a name for one.
Files of ``LFS`` endings go the way of large files. ``fail`` makes requests fail.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ADA, BOB = "hf_" + "a" * 30, "hf_" + "b" * 30  # tokens that may write as these two
READER = "hf_" + "r" * 30  # one of ada's that may only read
USERS = {ADA: "ada", BOB: "bob", READER: "ada"}
LFS = (".safetensors", ".png", ".bin", ".pt")


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return sha

    def commit(self, revision: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[revision] = sha
        return sha


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Failure:
    method: str
    pattern: str
    status: int | None  # None: the connection is closed without an answer
    times: int


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []

    def fail(self, method: str, pattern: str, status: int | None = 500, times: int = 1) -> None:
        self.failures.append(Failure(method, pattern, status, times))

    def client(self, token: str | None, home: Path) -> dict[str, str]:
        """The environment of a process that uses this server as the Hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token or ""}
        return {**own, "HF_HUB_CACHE": str(home / "hub"), "HF_MODULES_CACHE": str(home / "modules")}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[name].commits[self.repos[name].sha(revision)]

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


@contextmanager
def running() -> Iterator[HubServer]:
    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "check_card"),
    ("POST", f"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"/api/models/{_ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", f"/api/models/{_ID}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", f"/api/models/{_ID}/tag/(?P<revision>[^/]+)", "tag"),
    ("GET", f"/api/models/{_ID}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", f"/api/models/{_ID}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "receive"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ("GET", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nothing; ``server.requests`` has them."""

    def do(self) -> None:
        self.body = self._read()
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        for failure in self.server.failures:
            if failure.times and failure.method == self.command and re.search(failure.pattern, path):
                failure.times -= 1
                if failure.status is None:
                    self.close_connection = True
                    return
                self.answer(b"<html>out of order</html>", failure.status)  # no JSON: a gateway in front of it
                return
        try:
            for wanted, pattern, name in ROUTES:
                if wanted == method and (match := re.fullmatch(pattern, path)):
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    getattr(self, name)(**arguments)
                    return
            raise Refusal(404, "", f"no such call: {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.answer({"error": refusal.message}, refusal.status, {key: value for key, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = do

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who may do what.

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in USERS:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return USERS[token]

    def readable(self, name: str) -> Repo:
        repo, user = self.server.repos.get(name), self.user()
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def check_may_write(self, name: str) -> None:
        if self.user() != name.partition("/")[0] or READER in self.headers.get("Authorization", ""):
            raise Refusal(403, "", f"You don't have the rights to write to {name}")

    @property
    def makes_pr(self) -> bool:
        return "create_pr=1" in urlsplit(self.path).query

    # The calls.

    def whoami(self) -> None:
        if (user := self.user()) is None:
            raise Refusal(401, "", "Invalid username or password.")
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        self.check_may_write(name)
        status = 409 if name in self.server.repos else 200
        if status == 200:
            repo = Repo(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
            repo.commit("main", {".gitattributes": b""})
            self.server.repos[name] = repo
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, status)

    def check_card(self) -> None:
        try:
            metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    assert result["task"]["type"]
                    assert result["dataset"]["type"]
                    assert result["dataset"]["name"]
                    assert all(metric["type"] and "value" in metric for metric in result["metrics"])
            assert re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "other")), "license"
        except Exception as error:
            self.answer({"errors": [{"message": f"metadata: {error!r}"}], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:
        repo = self.readable(id)
        if not self.makes_pr:
            self.check_may_write(id)
        files = repo.commits[repo.sha(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large, present = file["path"].endswith(LFS), files.get(file["path"])
            oid = None if present is None else _oid(present, large)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def batch(self, id: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            href = f"{self.server.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append({**item} if item["oid"] in self.server.large else {**item, "actions": actions})
        self.answer({"objects": objects, "transfer": "basic"})

    def receive(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the content is not what its name says")
        self.server.large[oid] = self.body
        self.answer({})

    def verify(self, oid: str) -> None:
        if oid not in self.server.large:
            raise Refusal(404, "EntryNotFound", "nothing was received")
        self.answer({})

    def commit(self, id: str, revision: str) -> None:
        repo = self.readable(id)
        if not self.makes_pr:
            self.check_may_write(id)
        files = dict(repo.commits[repo.sha(revision)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        sha = repo.commit(f"refs/pr/{number}" if self.makes_pr else revision, files)
        url = f"{self.server.url}/{id}"
        pull_request = f"{url}/discussions/{number}" if self.makes_pr else None
        self.answer({"commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "pullRequestUrl": pull_request})

    def branch(self, id: str, name: str) -> None:
        self.name(id, name, "main")

    def tag(self, id: str, revision: str) -> None:
        self.name(id, json.loads(self.body)["tag"], revision)

    def name(self, id: str, name: str, revision: str) -> None:
        repo = self.readable(id)
        self.check_may_write(id)
        if name in repo.refs:
            raise Refusal(409, "", f"{name} exists")
        repo.refs[name] = repo.sha(revision)
        self.answer({})

    def info(self, id: str, revision: str | None = None) -> None:
        repo = self.readable(id)
        sha = repo.sha(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.answer(
            {"_id": id, "id": id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        )

    def tree(self, id: str, revision: str) -> None:
        repo = self.readable(id)
        files = repo.commits[repo.sha(revision)]
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
            for path, content in files.items()
        ]
        self.answer(entries)

    def resolve(self, id: str, revision: str, path: str) -> None:
        repo = self.readable(id)
        sha = repo.sha(revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", f"no {path}")
        large = path.endswith(LFS)
        headers = {"ETag": f'"{_oid(content, large)}"', "X-Repo-Commit": sha}
        if large:
            headers |= {"X-Linked-Etag": f'"{_oid(content, True)}"', "X-Linked-Size": str(len(content))}
        self.answer(content, headers=headers)


def _oid(content: bytes, large: bool) -> str:
    """Name of a content: that of large files is their SHA-256, that of others the one that git gives them."""
    return hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
