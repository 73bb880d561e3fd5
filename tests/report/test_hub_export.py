"""A run as a data set: its folder and card, and the upload to a local server with the hub's real client."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from helpers import write_run

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.landscapes.axes import symmetric_axes

pytest.importorskip("pyarrow")

FILES = {"README.md", "points.parquet", "generations.parquet"} | {
    f"run/{name}" for name in ("config.json", "prompts.jsonl", "generations.jsonl", "landscape.json")
}


@dataclass
class Hub:
    """What the server has.

    Attributes:
        private: for each data set, by name, whether it is private.
        files: for each data set, the contents of its files by path.
    """

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if name not in self.hub.private:
            return self._answer({"error": "Repository not found"}, 404)
        return self._answer({"id": name, "sha": "a" * 40, "private": self.hub.private[name]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            is_new = name not in self.hub.private
            assert wanted["type"] == "dataset"
            self.hub.private.setdefault(name, wanted.get("private", wanted.get("visibility") == "private"))
            address = {"url": f"http://{self.headers['Host']}/datasets/{name}"}
            return self._answer(address, 200 if is_new else 409)
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.hub.files.setdefault(name, {})[entry["value"]["path"]] = content
        address = f"http://{self.headers['Host']}/datasets/{name}/commit/{'b' * 40}"
        return self._answer({"commitUrl": address, "commitOid": "b" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    handler = type("TheHandler", (Handler,), {"hub": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield found
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    refused = np.random.default_rng(0).random((1, 5, 2)) > 0.5
    return write_run(tmp_path / "run", refused, symmetric_axes(1, 4, 0.5), ["Do harm", "Do evil"], model="org/*tiny*")


def refuses(run: Path, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """What `jaxscape export` says when it ends with an error of the user's."""
    with pytest.raises(SystemExit) as end:
        main(["export", str(run), "--to", "hub", *options])
    assert end.value.code == 2
    return capfd.readouterr().err


def test_a_dry_run_writes_the_folder_and_lists_what_would_be_uploaded(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / "notes.txt").write_text("mine")
    main(["export", str(run), "--to", "hub", "--repo", "me/data", "--dry-run"])
    first, *rest = capfd.readouterr().out.splitlines()
    folder = run / "hub"
    assert first == f"{folder} would be uploaded to the private data set me/data:"
    assert {line.split()[-1] for line in rest} == FILES
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    card = huggingface_hub.DatasetCard.load(folder / "README.md")
    assert "not-for-all-audiences" in card.data.tags
    assert [table["data_files"] for table in card.data.configs] == ["points.parquet", "generations.parquet"]
    assert "Warning: harmful content" in card.text
    assert r"org/\*tiny\*" in card.text
    assert "Do harm" not in card.text
    # What is downloaded is a run again.
    np.testing.assert_array_equal(js.Landscape.load(folder / "run").asr, js.Landscape.load(run).asr)
    main(["export", str(folder / "run"), "--to", "csv"])


def test_an_upload_is_private_and_has_the_files_of_the_folder(
    hub: Hub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "elsewhere"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for _ in range(2):  # a second upload replaces the files
        main(["export", str(run), "--to", "hub", "--repo", "me/data", "--out", str(out)])
        assert capfd.readouterr().out.strip().endswith("/datasets/me/data")
    assert hub.private == {"me/data": True}
    assert hub.files["me/data"] == {name: (out / name).read_bytes() for name in FILES}


def test_harmful_texts_are_uploaded_to_a_public_data_set_only_on_request(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.private["me/public"] = False
    assert "me/public is public" in refuses(run, capfd, "--repo", "me/public")
    assert hub.files == {}
    main(["export", str(run), "--to", "hub", "--repo", "me/new", "--public"])
    assert hub.private["me/new"] is False
    assert hub.files["me/new"].keys() == FILES


def test_an_upload_without_the_right_says_what_to_do(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    error = refuses(run, capfd, "--repo", "me/data")
    assert "me/data cannot be uploaded" in error
    assert "hf auth login" in error
    assert "hf_other" not in error
    assert hub.private == hub.files == {}
