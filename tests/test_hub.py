"""Models from the hub, by whole commands and a server that speaks its protocol: see `hub_server`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import published
import pytest
import torch
from hub_server import Hub, Repository, commit
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from gridprune_cli.errors import DOWNLOAD, BadInput
from gridprune_cli.vlm import find

NAME = "llava-hf/llava-interleave-qwen-0.5b-hf"  # its relevance needs no second model
QUESTION = "what colour is the left object?"
LARGE = 40 << 20  # bytes of a further weight file; the client stores a file in pieces of 10 MB
SMALL = tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
SOON = 30  # seconds; 2 are promised, where the machine has nothing else to do
PATIENCE = 200  # seconds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The small checkpoint of a published repository, and a large file that none of its weights is in."""
    folder = published.write(published.load()[NAME], tmp_path_factory.mktemp("hub") / "checkpoint")
    save_file({"unused": torch.arange(LARGE // 4, dtype=torch.int32)}, folder / "large.safetensors")
    return folder


@pytest.fixture
def hub(checkpoint, monkeypatch):
    monkeypatch.delattr(
        signal, "SIGPIPE"
    )  # which a command sets to end its process: here the server's, when one leaves
    with Hub({"some/model": Repository({"main": checkpoint, "v2": checkpoint})}) as server:
        yield server


SETTINGS = """
import os
import runpy
from huggingface_hub import constants  # which was imported without these variables

constants.ENDPOINT = os.environ["HF_ENDPOINT"]
constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
constants.HF_HUB_CACHE = os.path.join(os.environ["HF_HOME"], "hub")
constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
runpy.run_module("gridprune_cli", run_name="__main__")
"""


@pytest.fixture
def start(hub, tmp_path, server):
    """Starts `gridprune ask` in a process of its own, with an empty hub cache of this test. It writes to the files
    `out` and `err` there. `afresh`: a Python of its own, which itself reads what the environment says of the hub."""
    image, script = tmp_path / "image.png", tmp_path / "settings.py"
    Image.new("RGB", (64, 48), "red").save(image)
    script.write_text(SETTINGS)

    def run(model, offline=False, afresh=False):
        names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        arguments = ["ask", str(image), QUESTION, "--model", model, "--keep", "0.5"]
        arguments += ["--max-new-tokens", "3", "--dtype", "float32", "--json"]
        with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
            if afresh:
                command = [sys.executable, "-m", "gridprune_cli", *arguments]
                return subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            streams = (None, out.fileno(), err.fileno())
            return server.start(*arguments, env=environment, script=script, streams=streams)

    return run


@pytest.fixture
def ask(start, tmp_path):
    """Runs `gridprune ask` to its end: the answer, and how many tokens it is from."""

    def run(model, **options):
        code = start(model, **options).wait(PATIENCE)
        assert code == 0, (tmp_path / "err").read_text()
        answer = json.loads((tmp_path / "out").read_text())  # and nothing else
        assert 0 < answer["tokens"]["kept"] < answer["tokens"]["full"]
        return answer["answer"], answer["tokens"]

    return run


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """The hub's client of this process asks the server, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cached"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.slow
def test_first_second_and_offline_run(hub, ask, checkpoint):
    """The first fetches each file once, the second asks one thing, offline asks nothing; the answer stays the same."""
    answer = ask("some/model", afresh=True)
    fetched = [request for request in hub.requests if request.startswith("GET some/model/resolve")]
    assert len(fetched) == len(set(fetched)) == len([file for file in checkpoint.iterdir() if file.is_file()])
    assert hub.sent == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    hub.requests.clear()
    assert ask("some/model") == answer
    assert hub.requests == ["HEAD some/model/resolve/main/config.json"]
    hub.requests.clear()
    assert ask("some/model", offline=True) == answer
    assert hub.requests == []


def test_ctrl_c_ends_a_download_and_the_next_one_fetches_the_rest(hub, start, ask, tmp_path):
    """Files that are whole are not fetched again, and no part of another is left. A broken connection is taken up."""
    repository = hub.repositories["some/model"]
    repository.stalls = 15 << 20
    process = start("some/model")
    snapshot = tmp_path / "hf" / "hub" / "models--some--model" / "snapshots" / commit("main")
    deadline = time.monotonic() + PATIENCE
    while hub.sent < repository.stalls or not all((snapshot / name).exists() for name in SMALL):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    code = process.wait(PATIENCE)
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert (code, out) == (130, "") and time.monotonic() - sent < SOON, err
    assert "Traceback" not in err
    assert not list((snapshot.parents[1] / "blobs").glob("*.incomplete"))
    repository.stalls, repository.breaks, hub.sent = 0, 1, 0
    hub.requests.clear()
    ask("some/model")
    assert not [request for request in hub.requests if request.startswith("GET") and request.endswith(SMALL)]
    assert sum(request.startswith("GET") and request.endswith("large.safetensors") for request in hub.requests) == 2
    assert repository.breaks == 0 and hub.sent < LARGE + (12 << 20)  # of the break's piece, what was not stored yet


@pytest.mark.parametrize(
    ("model", "exit_code", "reason"),
    [
        ("some/gated", 2, "needs a licence accepted; do so at"),
        ("some/missing", 2, "no such folder, and no such model on the hub; check the name"),
        ("some/model@v9", 2, "no branch, tag or commit v9; check its name"),
    ],
)
def test_what_can_not_be_fetched_is_one_line(hub, here, command, checkpoint, model, exit_code, reason):
    hub.repositories["some/gated"] = Repository({"main": checkpoint}, gated=True)
    code, out, err = command("ask", "image.png", QUESTION, "--model", model)
    assert (code, out) == (exit_code, "") and reason in err and err.count("\n") == 1


def test_the_revision_named_is_fetched(hub, checkpoint, here, tmp_path):
    assert find("some/model@v2").commit == commit("v2")
    assert find("some/model", commit("main")).commit == commit("main")


def test_pickled_weights_are_fetched_where_there_are_no_others(hub, checkpoint, here, tmp_path):
    both = shutil.copytree(checkpoint, tmp_path / "both", ignore=shutil.ignore_patterns("large*"))
    weights = {}
    for path in both.glob("*.safetensors"):
        weights |= load_file(path)
    torch.save(weights, both / "pytorch_model.bin")
    pickled = shutil.copytree(both, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    hub.repositories |= {"some/both": Repository({"main": both}), "some/pickled": Repository({"main": pickled})}
    assert not (find("some/both").complete().folder / "pytorch_model.bin").exists()
    assert (find("some/pickled").complete().folder / "pytorch_model.bin").is_file()


def test_a_repository_without_weights(hub, checkpoint, here, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "none", ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "tf_model.h5").write_bytes(b"weights of another library")
    hub.repositories["some/other"] = Repository({"main": folder})
    with pytest.raises(BadInput, match="weights"):
        find("some/other").complete()
    assert not [request for request in hub.requests if request.endswith(".h5")]


def test_an_interrupted_download_raises_at_once_in_python(hub, here):
    repository = hub.repositories["some/model"]
    repository.stalls = 15 << 20
    checkpoint = find("some/model")

    def interrupt():
        while hub.sent < repository.stalls:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.complete()
    assert time.monotonic() - start < SOON + PATIENCE / 10
    repository.stalls = 0
    while any(thread.name == DOWNLOAD for thread in threading.enumerate()):  # which ends at the next piece of a file
        assert time.monotonic() - start < PATIENCE
        time.sleep(0.05)
    assert not (checkpoint.folder / "large.safetensors").exists()
    assert not list((checkpoint.folder.parents[1] / "blobs").glob("*.incomplete"))
