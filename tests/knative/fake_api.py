"""A Kubernetes API server over HTTP, as far as deployments go: store, server-side apply, conflicts.

Apply works as documented: a field that another manager owns and that would change is a conflict
(409) naming that manager; a field that a manager no longer sends goes; resourceVersion changes only
when something does, and generation with the spec.
"""

from __future__ import annotations

import copy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import msgspec

Object = dict[str, Any]


class FakeApi:
    """`objects` by (path of the collection, name); `requests` in order as (method, path, query)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.owners: dict[tuple[str, str], dict[tuple[Any, ...], str]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.denied: set[tuple[str, str]] = set()  # (resource, verb)
        self.version = 0
        self.lock = threading.Lock()

        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._answer(*api.get(*self._asked("GET")))

            def do_POST(self) -> None:
                self._answer(*api.post(*self._asked("POST"), self._body()))

            def do_PATCH(self) -> None:
                assert self.headers["content-type"] == "application/apply-patch+yaml"
                self._answer(*api.apply(*self._asked("PATCH"), self._body()))

            def do_DELETE(self) -> None:
                self._body()
                self._answer(*api.delete(*self._asked("DELETE")))

            def _asked(self, method: str) -> tuple[str, dict[str, str]]:
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                api.requests.append((method, parts.path, query))
                return parts.path, query

            def _body(self) -> Object:
                raw = self.rfile.read(int(self.headers.get("content-length", 0)))
                return dict(msgspec.json.decode(raw)) if raw else {}

            def _answer(self, status: int, body: Object) -> None:
                raw = msgspec.json.encode(body)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def put(self, collection: str, one: Object) -> Object:
        """Store as somebody else would."""
        self.version += 1
        one = copy.deepcopy(one)
        one["metadata"]["resourceVersion"] = str(self.version)
        one["metadata"].setdefault("generation", 1)
        one["metadata"].setdefault("creationTimestamp", "2026-11-23T12:00:00Z")
        self.objects[collection, one["metadata"]["name"]] = one
        return one

    def get(self, path: str, query: dict[str, str]) -> tuple[int, Object]:
        collection, _, name = path.rpartition("/")
        if (collection, name) in self.objects:
            return 200, self.objects[collection, name]
        if name.endswith("s") and not collection.endswith("s"):
            labels = dict(
                pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair
            )
            items = [
                one
                for (where, _), one in sorted(self.objects.items())
                if where == path and labels.items() <= one["metadata"].get("labels", {}).items()
            ]
            return 200, {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}
        return 404, _failure(404, f'"{name}" not found')

    def post(self, path: str, query: dict[str, str], one: Object) -> tuple[int, Object]:
        if path.endswith("selfsubjectaccessreviews"):
            asked = one["spec"]["resourceAttributes"]
            allowed = (asked["resource"], asked["verb"]) not in self.denied
            return 201, {**one, "status": {"allowed": allowed}}
        with self.lock:
            if (path, one["metadata"]["name"]) in self.objects:
                return 409, _failure(409, "already exists")
            return 201, self.put(path, one)

    def apply(self, path: str, query: dict[str, str], one: Object) -> tuple[int, Object]:
        collection, _, name = path.rpartition("/")
        manager = query["fieldManager"]
        with self.lock:
            now = self.objects.get((collection, name))
            owners = dict(self.owners.get((collection, name), {}))
            sent = dict(_leaves(one))
            after = copy.deepcopy(now) if now is not None else {"metadata": {}}
            for place, value in sent.items():
                owner = owners.get(place)
                differs = _at(after, place) != value
                if owner not in {None, manager} and differs and query.get("force") != "true":
                    where = ".".join(map(str, place))
                    return 409, _failure(409, f'conflict with "{owner}": .{where}')
                _set(after, place, value)
                owners[place] = manager
            for place in [p for p, owner in owners.items() if owner == manager and p not in sent]:
                _drop(after, place)
                del owners[place]
            if now is not None and after == now:
                return 200, now
            if now is None or after.get("spec") != now.get("spec"):
                after["metadata"]["generation"] = after["metadata"].get("generation", 0) + 1
            if "dryRun" in query:
                return 200, after
            self.owners[collection, name] = owners
            return 200 if now is not None else 201, self.put(collection, after)

    def delete(self, path: str, query: dict[str, str]) -> tuple[int, Object]:
        collection, _, name = path.rpartition("/")
        with self.lock:
            gone = self.objects.pop((collection, name), None)
            self.owners.pop((collection, name), None)
        return (200, gone) if gone is not None else (404, _failure(404, "not found"))

    def count(self, method: str) -> int:
        return sum(one[0] == method for one in self.requests)


def _failure(code: int, message: str) -> Object:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": ""}


def _leaves(value: Object, place: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Maps are merged by key and lists taken whole, as for a resource without list types."""
    found = []
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found += _leaves(inner, (*place, key))
        else:
            found.append(((*place, key), inner))
    return found


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(value: Object, place: tuple[Any, ...], leaf: Any) -> None:
    for key in place[:-1]:
        value = value.setdefault(key, {})
    value[place[-1]] = leaf


def _drop(value: Object, place: tuple[Any, ...]) -> None:
    for key in place[:-1]:
        value = value.get(key, {})
    value.pop(place[-1], None)
