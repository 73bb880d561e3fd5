"""Downloads from a local server with the hub's real client: which files, resuming, revisions and errors."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import hub_configs
import numpy as np
import pytest

import jaxscape as js
from jaxscape.forecast.known_models import SHAPES, shape_config
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.decoder import parameter_shapes

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@dataclass
class Hub:
    """What the server has: for each repository and commit, the files' contents by path."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    breaks: int = 0
    """The number of downloads of weights that will break off half-way."""
    fetched: list[tuple[str, int]] = field(default_factory=list)
    """The path of each downloaded file, and the first byte that was requested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _send(
        self, status: int, body: bytes = b"", with_body: bool = True, until: int | None = None, **headers: str
    ) -> None:
        """Send an answer. If `until` is given, only that many bytes of the body are sent."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[:until])

    def _answer(self, with_body: bool) -> None:
        parts = urlparse(self.path).path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        kind, revision, *rest = parts[4:] if is_api else parts[2:]
        if name not in self.hub.repositories:
            return self._send(401, with_body=with_body, X_Error_Code="RepoNotFound")
        if name in self.hub.gated and not (is_api and kind == "revision"):
            return self._send(403, with_body=with_body, X_Error_Code="GatedRepo")
        commit = COMMITS.get(revision, revision)
        files = self.hub.repositories[name].get(commit)
        if files is None:
            return self._send(404, with_body=with_body, X_Error_Code="RevisionNotFound")
        if is_api:
            tree = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": commit, "siblings": siblings} if kind == "revision" else tree
            return self._send(200, json.dumps(info).encode(), with_body, Content_Type="application/json")
        path = "/".join(rest)
        if path not in files:
            return self._send(404, with_body=with_body, X_Error_Code="EntryNotFound")
        self._send_file(path, files[path], commit, with_body)

    def _send_file(self, path: str, content: bytes, commit: str, with_body: bool) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        until = None
        if with_body:
            self.hub.fetched.append((path, start))
        if with_body and path.endswith(".safetensors") and self.hub.breaks > 0:
            self.hub.breaks -= 1
            self.close_connection = True
            until = (len(content) - start) // 2
        self._send(206 if start else 200, content[start:], with_body, until, **headers)


@pytest.fixture
def hub(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny_dir.iterdir()}
    more = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.json": b"{}", "modeling.py": b""}
    older = files | {"generation_config.json": b'{"eos_token_id": 7}'}
    found = Hub({"someone/tiny": {COMMITS["main"]: files | more, COMMITS["v1"]: older}})
    handler = type("TheHandler", (Handler,), {"hub": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        template = here + "/{repo_id}/resolve/{revision}/{filename}"
        changes = {"ENDPOINT": here, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False}
        for name, value in (changes | {"HUGGINGFACE_CO_URL_TEMPLATE": template}).items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield found
        server.shutdown()


@pytest.mark.cpu
def test_only_what_a_model_consists_of_is_fetched(hub: Hub, tiny: js.Model) -> None:
    model = js.load_model("someone/tiny")
    fetched = {path for path, _ in hub.fetched}
    assert "model.safetensors" in fetched
    assert "tokenizer.json" in fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.json", "modeling.py"}
    tokens = np.arange(3, 9)[None]
    np.testing.assert_array_equal(model(tokens), tiny(tokens))
    described = model.described()
    assert described.pop("commits") == {"someone/tiny": COMMITS["main"]}
    assert described == tiny.described() | {"model": "someone/tiny"}


def test_a_revision_is_pinned_and_kept_for_later(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert js.load_model("someone/tiny@v1").eos_token_ids == (2, 7)
    assert js.load_model("someone/tiny").eos_token_ids == (2,)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.repositories.clear()
    model = js.load_model("someone/tiny@v1")
    assert model.eos_token_ids == (2, 7)
    assert model.name == "someone/tiny@v1"
    assert js.load_model(f"someone/tiny@{COMMITS['main']}").eos_token_ids == (2,)


@pytest.mark.cpu
def test_a_broken_download_goes_on_where_it_broke_off(
    hub: Hub, tiny: js.Model, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.breaks = 1
    model = js.load_model("someone/tiny")
    size = (tiny_dir / "model.safetensors").stat().st_size
    first, second = [start for path, start in hub.fetched if path == "model.safetensors"]
    assert first == 0
    assert 0.4 * size < second <= size // 2
    assert fingerprint(model.params) == fingerprint(tiny.params)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/tiny@v9", "someone/tiny has no revision 'v9'"),
        ("someone/other", "The hub has no model someone/other, or it is private"),
        ("meta/closed", "meta/closed is gated: ask for access at .*meta/closed, then log in"),
    ],
)
def test_what_cannot_be_had_is_said(hub: Hub, name: str, message: str) -> None:
    hub.repositories["meta/closed"] = {COMMITS["main"]: {"config.json": b"{}"}}
    hub.gated.add("meta/closed")
    with pytest.raises(js.UserError, match=message):
        js.load_model(name)


def test_a_plan_fetches_the_configuration_alone(hub: Hub, tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(hub.repositories["someone/tiny"][COMMITS["main"]]["config.json"])
    wide = json.dumps(config | {"intermediate_size": 96}).encode()
    hub.repositories["someone/tiny"][COMMITS["v1"]]["config.json"] = wide
    assert shape_config("someone/tiny") == tiny.config
    assert shape_config("someone/tiny@v1").intermediate_size == 96
    assert hub.fetched == [("config.json", 0)] * 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert shape_config("someone/tiny@v1").intermediate_size == 96, "from the cache"
    with pytest.raises(js.UserError, match="someone/other is not in the cache and the hub cannot be reached"):
        shape_config("someone/other")


def test_what_no_plan_can_be_made_for_is_said(hub: Hub) -> None:
    hub.repositories["someone/adapter"] = {COMMITS["main"]: {"adapter_config.json": b"{}", "model.gguf": b"x"}}
    for name, message in {
        "someone/adapter": "The hub's someone/adapter has no config.json",
        "someone/tiny@v9": "someone/tiny has no revision 'v9'",
        "someone/other": "The hub has no model someone/other",
    }.items():
        with pytest.raises(js.UserError, match=message):
            shape_config(name)
    assert hub.fetched == []


def test_repositories_of_gguf_files_say_how_to_get_one(hub: Hub) -> None:
    hub.repositories["someone/files"] = {COMMITS["main"]: {"model.Q4_0.gguf": b"x", "README.md": b""}}
    with pytest.raises(js.UserError, match=r"someone/files has no config.json: .*'hf download someone/files FILE'"):
        js.load_model("someone/files")


def test_hub_ids_of_known_models_need_no_hub(hub: Hub) -> None:
    hub.repositories.clear()
    for name, model in SHAPES.items():
        for hub_id in model.hub_ids:
            assert shape_config(hub_id) == shape_config(f"{hub_id.lower()}@main") == shape_config(name)


@pytest.mark.parametrize(
    ("hub_id", "vocab_size", "window"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.1", 32000, 4096),
        ("mistralai/Mistral-7B-Instruct-v0.2", 32000, None),
        ("mistralai/Mistral-7B-Instruct-v0.3", 32768, None),
        ("microsoft/Phi-3-mini-4k-instruct", 32064, 2047),
        ("META-LLAMA/llama-2-7b-CHAT-hf", 32000, None),
    ],
)
def test_versions_of_a_model_have_their_own_vocabulary_and_window(
    hub_id: str, vocab_size: int, window: int | None
) -> None:
    config = shape_config(hub_id)
    assert (config.vocab_size, config.kind(0).window) == (vocab_size, window)


@pytest.mark.parametrize("name", sorted(hub_configs.CONFIGS))
def test_known_shapes_are_those_of_the_hubs_configurations(name: str, tmp_path: Path) -> None:
    hub_id = next((i for model in SHAPES.values() for i in model.hub_ids if i.partition("/")[2].startswith(name)), None)
    if hub_id is None:
        pytest.skip("not one of the known models")
    (tmp_path / "config.json").write_text(json.dumps(hub_configs.CONFIGS[name][0]))
    published, known = shape_config(str(tmp_path)), shape_config(hub_id)
    assert parameter_shapes(known) == parameter_shapes(published)
    assert [kind.window for kind in known.layers] == [kind.window for kind in published.layers] or (
        known.kind(0).window is None and published.kind(0).window == 2**18  # longer than the context
    )
