"""``ptq upload``: what is sent, what the card says, and every way it is refused."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from command import run_ptq

import ptq
from calibration.errors import ToolkitError

DEMO = Path(ptq.__file__).parents[1] / "calibration" / "demo"


class FakeApi:
    """Keeps what would be sent."""

    sent: dict[str, Any]

    def create_repo(self, repo: str, **options: Any) -> str:
        FakeApi.sent = {"repo": repo, **options}
        return f"https://hub/{repo}"

    def create_commit(self, repo: str, operations: list[Any], **_: Any) -> None:
        FakeApi.sent["files"] = {o.path_in_repo: o.path_or_fileobj for o in operations}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("upload")
    model = place / "model"
    shutil.copytree(DEMO, model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (model / "vocabulary.tiktoken").write_text("IQ== 0\n")
    ptq.quantize(model, method="rtn", out=place / "out")
    return place / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)


def card(content: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(content.decode().split("---\n")[1]))


def test_sends_the_model_and_says_what_it_is(folder: Path, hub: None) -> None:
    (folder / "optimizer.bin").write_bytes(b"x")
    sent = ptq.upload(folder, "org/tiny", private=True, base_model="org/base")
    files = FakeApi.sent["files"]
    assert FakeApi.sent["repo"] == "org/tiny" and FakeApi.sent["private"] is True
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.html"} <= set(files)
    assert {"additional_chat_templates/rag.jinja", "vocabulary.tiktoken"} <= set(files)  # nothing is lost on the way
    assert not {"plan.json", "timings.json", "optimizer.bin"} & set(files)
    data = card(files["README.md"])
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert sent.files["README.md"] == len(files["README.md"]) and "base_model" not in (folder / "README.md").read_text()
    ptq.upload(folder, "org/tiny", license="mit", language=["de", "en"])
    data = card(FakeApi.sent["files"]["README.md"])
    assert data["license"] == "mit" and data["language"] == ["de", "en"] and "base_model" not in data


def test_sends_a_gguf_file_with_a_card(tmp_path: Path, hub: None) -> None:
    pytest.importorskip("gguf")
    ptq.quantize("demo", method="rtn", scheme="q8_0", format="gguf", out=tmp_path / "tiny.gguf")
    ptq.upload(tmp_path / "tiny.gguf", "org/tiny", base_model="org/base")
    files = FakeApi.sent["files"]
    assert set(files) == {"tiny.gguf", "tiny.report.html", "README.md"}
    assert card(files["README.md"])["library_name"] == "gguf" and card(files["README.md"])["base_model"] == "org/base"
    (tmp_path / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:1000])
    with pytest.raises(ToolkitError, match="not readable as GGUF"):
        ptq.upload(tmp_path / "tiny.gguf", "org/tiny")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "org/ti ny", "org/", "https://huggingface.co/org/tiny"])
def test_refuses_what_is_no_hub_id(folder: Path, hub: None, repo: str) -> None:
    with pytest.raises(ToolkitError, match="not a hub id"):
        ptq.upload(folder, repo)
    with pytest.raises(ToolkitError, match=r"--base-model .*not a hub id"):
        ptq.upload(folder, "org/tiny", base_model=repo)


def test_refuses_what_is_no_finished_model_before_sending(folder: Path, tmp_path: Path, hub: None) -> None:
    FakeApi.sent = {}
    broken, partial = tmp_path / "broken", tmp_path / "run.partial"
    shutil.copytree(folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    partial.mkdir()
    for path, words in ((broken, "model.safetensors"), (partial, "unfinished"), (tmp_path / "none", "no such folder"),
                        (DEMO, "float model"), (tmp_path / "none.gguf", "no such file")):  # fmt: skip
        with pytest.raises(ToolkitError, match=words):
            ptq.upload(path, "org/tiny")
    assert not FakeApi.sent


def test_refuses_without_a_token(folder: Path, hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ToolkitError, match="no token") as refused:
        ptq.upload(folder, "org/tiny")
    assert "hf auth login" in str(refused.value)


def test_quantize_pushes_its_result(folder: Path, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["quantize", "demo", "--method", "rtn", "--quiet", "--out", tmp_path / "out", "--push"]
    refusals = [("no-org", "not a hub id"), ("org/tiny", "no token"), ("org/tiny", "cannot be reached")]
    token = huggingface_hub.get_token
    for (repo, reason), lacking in zip(refusals, (False, True, False), strict=True):
        monkeypatch.setattr(huggingface_hub, "get_token", (lambda: None) if lacking else token)
        done = run_ptq(*words, repo)  # the api here has no whoami, as if the way there failed
        assert done.code == 2 and reason in done.err and not (tmp_path / "out").exists()
    monkeypatch.setattr(FakeApi, "whoami", lambda self: {"name": "me"}, raising=False)
    done = run_ptq(*words, "org/tiny")
    assert done.code == 0 and "sent to https://hub/org/tiny" in done.out
    assert FakeApi.sent["repo"] == "org/tiny" and "model.safetensors" in FakeApi.sent["files"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_one_pushes(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setattr(FakeApi, "whoami", lambda self: {"name": "me"}, raising=False)
    monkeypatch.setattr("cli.quantize._quantize", lambda *args: None)
    sent: list[object] = []
    monkeypatch.setattr("ptq.upload", lambda *args: sent.append(args) or SimpleNamespace(files={}, url="hub"))
    launcher = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    done = run_ptq("quantize", "demo", "--method", "awq", "--quiet", "--out", tmp_path / "out", "--push", "org/tiny")
    assert done.code == 0 and len(sent) == (rank == "0")


class Forbidden(http.server.BaseHTTPRequestHandler):
    """A hub on which nothing may be written."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"error": "You don't have the rights to create a model under the namespace"}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def forbidden() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Forbidden)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("reachable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_hub_that_refuses_is_one_message(folder: Path, forbidden: str, reachable: bool) -> None:
    endpoint = forbidden if reachable else "http://127.0.0.1:9"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "cli.main", "upload", str(folder), "org/tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert ("does not let this token write" if reachable else "cannot be reached") in done.stderr
