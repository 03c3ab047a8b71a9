"""Finding checkpoints: the packaged demo, paths, and a hub played by a local server, then taken away."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxzs.clip.hub import find_checkpoint
from jaxzs.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden/clip"
FAMILIES = GOLDEN.parent / "families"
COMMIT = "5" * 40


@pytest.fixture
def repositories(tmp_path):
    """Folders that the server offers: one with many formats, one with shards, one that is no CLIP."""
    root = tmp_path / "offered"
    many = root / "me/many"
    shutil.copytree(GOLDEN / "gelu_first_eos", many)
    shutil.copy(GOLDEN / "variants/safetensors_torch/model.safetensors", many)
    shutil.copy(GOLDEN / "variants/torch_bin/pytorch_model.bin", many)
    for name in ("tokenizer.json", "processor_config.json", "added_tokens.json"):
        (many / name).write_text("{}")
    (many / "training_args.json").write_text("{}")
    shutil.copytree(GOLDEN / "variants/sharded_flax", root / "me/sharded")
    shutil.copytree(FAMILIES / "rn_quickgelu", root / "me/timm")  # with timm's config.json and its image tower
    (root / "me/laion").mkdir()  # both layouts whole
    shutil.copy(GOLDEN / "gelu_first_eos/config.json", root / "me/laion")
    shutil.copy(GOLDEN / "variants/safetensors_torch/model.safetensors", root / "me/laion")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        shutil.copy(FAMILIES / "vit_gelu" / name, root / "me/laion")
    (root / "me/blip").mkdir()
    (root / "me/blip/config.json").write_text('{"model_type": "blip"}')
    (root / "me/blip/model.safetensors").write_bytes(b"large")
    (root / "me/empty").mkdir()
    (root / "me/empty/README.md").write_text("nothing")
    return root


@pytest.fixture
def hub(repositories):
    """(address, paths of the files it has sent) of a server that speaks the hub's protocol."""
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            if path.startswith("api/models/"):
                return self.listing(path.removeprefix("api/models/"))
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            file = repositories / repo / name
            if revision not in ("main", COMMIT) or not file.is_file():
                return self.reply(404, X_Error_Code="EntryNotFound")
            content = file.read_bytes()
            if self.command == "GET":
                sent.append(f"{repo}/{name}")
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def listing(self, path):
            repo = "/".join(path.split("/")[:2])
            if not (repositories / repo).is_dir():
                return self.reply(404, X_Error_Code="RepoNotFound")
            if "/revision/" in path and path.split("/revision/")[1] not in ("main", COMMIT):
                return self.reply(404, X_Error_Code="RevisionNotFound")
            files = sorted(path.name for path in (repositories / repo).iterdir())
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": (repositories / repo / name).stat().st_size}
                    for name in files
                ]
                return self.reply(200, json.dumps(entries).encode())
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.reply(200, json.dumps(info).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    thread.join()
    server.server_close()


def find_in_new_process(requests: list[dict], cache: Path, endpoint: str, **environment) -> list:
    """What `find_checkpoint` returns or raises for each request; the hub's address is read at import."""
    script = """
import json, sys
from jaxzs.clip.hub import find_checkpoint
from jaxzs.clip.weights import read_checkpoint
from jaxzs.errors import JaxzsError
results = []
for request in json.loads(sys.argv[1]):
    try:
        folder = find_checkpoint(request.pop("name"), **request)
        read_checkpoint(folder)
        results.append(sorted(path.name for path in folder.iterdir()))
    except JaxzsError as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    variables = {
        **clean,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environment,
    }
    variables.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in environment else None
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(requests)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().split("\n")[-1])


MANY = ["added_tokens.json", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"]
OPEN_CLIP = ["open_clip_config.json", "open_clip_model.safetensors"]
SHARDED = ["config.json"] + [f"flax_model-0000{k}-of-00003.msgpack" for k in (1, 2, 3)]


def test_hub_and_its_cache(hub, tmp_path):
    address, sent = hub
    cache = tmp_path / "cache"
    found = find_in_new_process(
        [
            {"name": "me/many"},
            {"name": "me/sharded", "revision": COMMIT},
            {"name": "me/empty"},
            {"name": "me/absent"},
            {"name": "me/many", "revision": "v9"},
            {"name": "me/timm", "revision": COMMIT},
            {"name": "me/laion"},
            {"name": "me/blip"},
        ],
        cache,
        address,
    )
    assert found[0] == MANY  # one format of the weights, not three
    assert found[1] == [*SHARDED, "flax_model.msgpack.index.json"]
    assert "me/empty: not a repository of HuggingFace's or open_clip's layout: it lacks config.json" in found[2]
    assert "me/absent: neither a local path nor a public repository" in found[3]
    assert "no revision 'v9'" in found[4]
    assert set(OPEN_CLIP) < set(found[5])
    assert "model.safetensors" not in found[5]  # timm's image tower alone
    assert "model.safetensors" in found[6]
    assert "open_clip_model.safetensors" not in found[6]
    assert "me/blip: its config.json is not that of a CLIP or SigLIP" in found[7]
    assert "me/blip/model.safetensors" not in sent
    assert "me/many/model.safetensors" in sent
    assert not [name for name in sent if name.endswith((".bin", ".npz", "flax_model.msgpack"))]

    # The hub out of reach: what is in the cache serves, the rest says what was tried.
    nowhere = "http://127.0.0.1:9"
    asked = [{"name": "me/many"}, {"name": "me/absent"}, {"name": "me/timm", "revision": COMMIT}]
    found = find_in_new_process(asked, cache, nowhere)
    assert set(OPEN_CLIP) < set(found[2])
    assert found[0] == MANY
    assert f"the hub at {nowhere} could not be reached" in found[1]
    assert "`hf download me/absent --local-dir FOLDER`" in found[1]
    assert "Give the path of a folder" in found[1]
    assert str(cache) in found[1]


@pytest.mark.slow
def test_offline_mode_asks_nobody(hub, tmp_path):
    address, sent = hub
    asked = [{"name": "me/many"}, {"name": "me/many", "local_files_only": True}]
    found = find_in_new_process(asked, tmp_path / "cache", address, HF_HUB_OFFLINE="1")
    assert "the hub was not asked (HF_HUB_OFFLINE is set)" in found[0]
    assert "the hub was not asked (local_files_only is set)" in found[1]
    assert sent == []


def test_local_paths(tmp_path, monkeypatch):
    folder = GOLDEN / "odd_sizes"
    assert find_checkpoint(folder) == folder
    assert find_checkpoint(str(folder / "flax_model.msgpack")) == folder / "flax_model.msgpack"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert find_checkpoint("~/mine") == tmp_path / "mine"


def test_a_folder_without_a_checkpoint_does_not_hide_a_hub_id_silently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/clip").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"me/clip: a local folder of this name, /.*, hides the hub id"):
        find_checkpoint("me/clip")
    assert find_checkpoint("./me/clip") == Path("./me/clip")  # what is missing there is said when it is read
    assert find_checkpoint(Path("me/clip")) == Path("me/clip")
    (tmp_path / "me/clip/config.json").write_text("{}")
    assert find_checkpoint("me/clip") == Path("me/clip")


@pytest.mark.parametrize(
    "name",
    ["./missing", "/missing/folder", "a/b/c", "../up", "", "what is this?", Path("missing"), "a/" * 3000, "a\0b"],
)
def test_paths_that_do_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder, and not a hub id"):
        find_checkpoint(name)


def test_demo_is_the_packaged_one(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("demo").parent.name == "assets"
    assert find_checkpoint("./demo").resolve() == tmp_path / "demo"
