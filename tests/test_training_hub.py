"""Models of the hub: what cannot be had is refused at once, in a sentence that says why."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dpsgd_track.config import DataConfig, ModelConfig
from dpsgd_track.training import hub
from dpsgd_track.training.preflight import check_inputs

ANSWERS = {
    "org/gated": (403, "GatedRepo"),
    "org/gated-for-guests": (401, "GatedRepo"),
    "org/unknown": (401, "RepoNotFound"),
    "org/gguf-alone": (404, "EntryNotFound"),
    "org/busy": (503, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Answers for a file of a model as the hub does; says nothing of `org/silent`."""

    def do_HEAD(self) -> None:
        name = "/".join(self.path.split("/")[1:3])
        if name == "org/silent":
            time.sleep(1)
            return
        status, code = ANSWERS.get(name, (200, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", ".* It is gated: ask for access at .*/org/gated, then log in with `hf auth"),
        ("org/gated-for-guests", ".* It is gated: ask for access at"),
        ("org/unknown", ".*/org/unknown is not there, or private: check the name, or log in with"),
        ("org/gguf-alone", "a model with a config.json, which .*/org/gguf-alone lacks"),
        ("org/busy", ".*was not reached: .*503"),
        ("org/silent", ".*was not reached: .*timed out"),
        ("org/no name", "a hub id such as org/model. Repo id must"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_with_the_remedy(
    name: str, said: str, endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(endpoint, monkeypatch)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^model_name='{name}': expected {said}"):
        check_inputs(ModelConfig(name=name), DataConfig())
    assert time.monotonic() - start < 1
    check_inputs(ModelConfig(name="org/open"), DataConfig())


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_model_that_is_whole_in_the_cache_needs_no_hub(weights: str, cache: Path) -> None:
    model = ModelConfig(name="org/kept")
    folder = cache / "models--org--kept"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards = sorted(index["weight_map"].values()) if weights.endswith("json") else []
    for name in ("config.json", weights, *shards):
        with pytest.raises(
            ValueError, match=r"does not have all of it, and http:.* was not reached"
        ):
            check_inputs(model, DataConfig())
        (snapshot / name).write_text(json.dumps(index) if name == weights else "{}")
    check_inputs(model, DataConfig())
