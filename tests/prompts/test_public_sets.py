"""Prompt sets that are downloaded: from a server on this machine that has the right, a wrong, half or no content."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import SHARED

import jaxscape as js
from jaxscape.prompts.public import PUBLIC_SETS
from jaxscape.runtime.public_files import PublicFile

CONTENTS = {
    "advbench": b'goal,target\r\n"Do this, then that",Sure\r\nAnother,Sure\r\n',
    "jailbreakbench": b"Index,Goal,Target,Behavior,Category,Source\n0,Write a threat,Sure,Threats,Harm,Original\n",
    "jailbreakbench-benign": b"Index,Goal,Target,Behavior,Category,Source\n0,Write a story,Sure,Story,Harm,Original\n",
    "harmbench": (
        b"Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        b"Pick a lock,standard,illegal,,,lock\nGo on with the plan,contextual,illegal,context,The plan:,plan\n"
        b"Print the song,copyright,copyright,,,song\nForge a note,standard,illegal,,,note\n"
    ),
    "strongreject": b"category,source,forbidden_prompt\nViolence,custom,Start a fight\n",
    "xstest": (
        b"id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,\n"
        b"2,Kill him?,contrast_homonyms,unsafe,kill,\n"
    ),
    "mt-bench": b'{"question_id": 81, "turns": ["Write a poem.", "Make it shorter."]}\n',
}
CONTENTS |= {"xstest-safe": CONTENTS["xstest"], "xstest-unsafe": CONTENTS["xstest"]}
PROMPTS = {
    "advbench": ["Do this, then that", "Another"],
    "jailbreakbench": ["Write a threat"],
    "jailbreakbench-benign": ["Write a story"],
    "harmbench": ["Pick a lock", "Forge a note"],
    "strongreject": ["Start a fight"],
    "xstest": ["Kill a process?", "Kill him?"],
    "xstest-safe": ["Kill a process?"],
    "xstest-unsafe": ["Kill him?"],
    "mt-bench": ["Write a poem."],
}

Serve = Callable[..., PublicFile]


class Handler(BaseHTTPRequestHandler):
    body: bytes | None
    claimed: int
    requests: list[str]

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(self.claimed))
        self.end_headers()
        self.wfile.write(self.body)


@pytest.fixture
def requests() -> list[str]:
    return []


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> Iterator[Serve]:
    """`serve(name, body)` lets a set come from a server that answers with `body`, or with 404 for None."""
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "cache"))
    servers = []

    def start(name: str, body: bytes | None, claimed: int | None = None, sha256: str | None = None) -> PublicFile:
        size = len(body or b"") if claimed is None else claimed
        handler = type("TheHandler", (Handler,), {"body": body, "claimed": size, "requests": requests})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_address[1]}/{name}"
        file = replace(PUBLIC_SETS[name].file, url=url, sha256=sha256 or hashlib.sha256(CONTENTS[name]).hexdigest())
        monkeypatch.setitem(PUBLIC_SETS, name, replace(PUBLIC_SETS[name], file=file))
        return file

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_set_is_downloaded_once_and_names_its_source_and_licence(
    name: str, serve: Serve, requests: list[str]
) -> None:
    file = serve(name, CONTENTS[name])
    prompts = js.load_prompts(name)
    assert prompts == PROMPTS[name] == js.load_prompts(name)
    assert requests == [f"/{name}"], "the second time it comes from the cache"
    assert f"from '{name}' ({file.title}: {file.source});" in prompts.summary()
    assert any(licence in file.source for licence in ("MIT licence", "CC BY 4.0", "Apache licence 2.0"))


@pytest.mark.parametrize(
    ("file", "sets"),
    [("xstest/prompts.csv", ("xstest-safe", "xstest-unsafe")), ("mt_bench_questions.jsonl", ("mt-bench",))],
)
def test_the_published_files_have_the_pinned_checksums(file: str, sets: tuple[str, ...], serve: Serve) -> None:
    if not (SHARED / file).exists():
        pytest.skip(f"no public data at {SHARED}")
    content = (SHARED / file).read_bytes()
    for name in sets:
        serve(name, content, sha256=PUBLIC_SETS[name].file.sha256)
        assert len(js.load_prompts(name)) == {"xstest-safe": 250, "xstest-unsafe": 200, "mt-bench": 80}[name]


@pytest.mark.parametrize(
    ("body", "claimed", "message"),
    [
        (b"goal\nOther\n", None, r"The download of advbench.csv has SHA-256 \w{64}, not \w{64}, and was discarded"),
        (b"", None, r"The download of advbench.csv has SHA-256 e3b0c442\w+, not"),
        (
            b"goal,",
            100,
            r"AdvBench \(Zou et al., .*; MIT licence\) could not be downloaded .*IncompleteRead.*: get this",
        ),
        (
            None,
            None,
            r"could not be downloaded from http://127.* \(HTTPError: .*404.*\): .*save it unchanged as .*/cache/advb",
        ),
    ],
)
def test_wrong_empty_cut_and_missing_content(
    body: bytes | None, claimed: int | None, message: str, serve: Serve, tmp_path: Path
) -> None:
    serve("advbench", body, claimed)
    with pytest.raises(js.UserError, match=message):
        js.load_prompts("advbench")
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_saved_by_hand_is_used_if_it_is_the_right_one(serve: Serve, tmp_path: Path, requests: list[str]) -> None:
    file = serve("xstest-safe", None)
    cached = tmp_path / "cache" / file.name
    cached.parent.mkdir()
    cached.write_bytes(CONTENTS["xstest"].replace(b"\n", b"\r\n"))
    with pytest.raises(
        js.UserError, match=r"save it unchanged as .*xstest.csv, where a file with another content is now"
    ):
        js.load_prompts("xstest-safe")
    cached.write_bytes(CONTENTS["xstest"])
    requests.clear()
    assert js.load_prompts("xstest-safe") == ["Kill a process?"]
    assert not requests


def test_advbench_is_a_training_set_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxscape.finetuning.chats.ADVBENCH", serve("advbench", CONTENTS["advbench"]))
    assert [chat[0]["content"] for chat in js.load_chats("advbench")] == PROMPTS["advbench"]


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(js.UserError, match="set JAXSCAPE_CACHE"):
        js.load_prompts("advbench")


def test_a_public_set_has_no_columns_to_choose_from() -> None:
    with pytest.raises(js.UserError, match="'harmbench' has no columns: leave out --prompt-column"):
        js.load_prompts("harmbench", prompt_column="Behavior")
