"""Models named as on the hub: what is downloaded, what the cache serves, what is refused."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_huggingface, write_native
from hub_server import NAME, Hub, repository_cache, running_hub, write_snapshot
from huggingface_hub import constants

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.checkpoint_info import collect_checkpoint
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.hub import DownloadError, resolve_folder
from mistral_kernels.model.tokenizer import Tokenizer

TOKENIZER = "tokenizer.model.v1"
CLUTTER = {
    "README.md": b"#",
    "consolidated.00.pth": b"pickle",
    "pytorch_model.bin": b"pickle",
    "model.fp16.safetensors": b"a variant",
    "onnx/model.onnx": b"graph",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    use_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub with one model in both layouts, each in two shards, and much beside them."""
    with running_hub() as server:
        use_hub(monkeypatch, server.address)
        folder = cache.parent / "origin"
        write_native(folder, tiny_config(), shards=2)
        write_huggingface(folder, tiny_config(), shards=2)
        shutil.copyfile(TINY_MIXTRAL / TOKENIZER, folder / TOKENIZER)
        server.models[NAME] = CLUTTER | {p.name: p.read_bytes() for p in folder.iterdir()}
        yield server


def use_hub(monkeypatch, address: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def shards(stem: str) -> set[str]:
    return {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}


NATIVE = {"params.json", TOKENIZER} | shards("consolidated")
HUGGINGFACE = {"config.json", TOKENIZER, "model.safetensors.index.json"} | shards("model")


@pytest.mark.parametrize(
    "layout, files", [(None, NATIVE), ("native", NATIVE), ("huggingface", HUGGINGFACE)]
)
def test_one_set_of_weights_is_downloaded_once(hub, layout, files):
    folder = resolve_folder(NAME, layout=layout)
    assert hub.sent() == files == {path.name for path in folder.iterdir()}
    assert all((folder / name).read_bytes() == hub.models[NAME][name] for name in files)
    hub.requests.clear()
    for revision in ("", "@main", f"@{hub.commit(NAME)}"):
        assert resolve_folder(NAME + revision, layout=layout) == folder
    assert not hub.requests


def test_model_tokenizer_and_config_take_the_name(hub):
    tokenizer, config = Tokenizer.from_folder(NAME), ModelConfig.from_folder(NAME)
    assert hub.sent() == {"params.json", TOKENIZER}  # no weights for these two
    model = Transformer.from_folder(NAME, device="cpu")
    assert (model.config, tokenizer.vocab) == (config, 2048)
    local = Transformer.from_folder(hub_folder := model.folder, device="cpu")
    assert hub_folder == resolve_folder(NAME) and hub.sent() == NATIVE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, local.get_parameter(name))


def test_info_downloads_no_weights(hub):
    facts = collect_checkpoint(NAME)
    assert hub.sent() == {"params.json", TOKENIZER}
    assert (facts["name"], facts["files"]) == (NAME, {})
    assert facts["problem"].startswith("before its weights are downloaded, as loading does: ")


def test_what_is_not_supported_is_not_downloaded(hub):
    hub.models[NAME] |= {"params.json": b'{"kv_lora_rank": 512, "dim": 8}'}
    with pytest.raises(ValueError, match="MLA"):
        Transformer.from_folder(NAME)
    assert hub.sent() == {"params.json", TOKENIZER}


@pytest.mark.parametrize(
    ("folder", "error"), [(None, TypeError), (b"a/b", TypeError), ("", ValueError)]
)
def test_what_is_no_path(folder, error):
    with pytest.raises(error, match="^folder must be a .*(NoneType|bytes|'')$"):
        resolve_folder(folder)


@pytest.mark.parametrize("layout", [None, "huggingface"])
def test_a_started_download_is_completed(hub, cache, layout):
    """In the layout that was begun, although native comes first; a link may lack its file."""
    begun = {name: hub.models[NAME][name] for name in sorted(HUGGINGFACE)[:3]}
    snapshot = write_snapshot(cache, begun, commit=hub.commit(NAME))
    (repository_cache(cache) / "blobs" / "1").unlink()
    assert resolve_folder(NAME, layout=layout) == snapshot
    assert {path.name for path in snapshot.iterdir() if path.is_file()} == HUGGINGFACE
    assert hub.sent() == HUGGINGFACE - set(begun) | {sorted(HUGGINGFACE)[1]}


@pytest.mark.parametrize("write", [write_native, write_huggingface])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("offline", [False, True])
def test_a_complete_cache_needs_no_hub(cache, tmp_path, monkeypatch, write, count, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    write(tmp_path / "made", tiny_config(), shards=count)
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    snapshot = write_snapshot(
        cache, files
    )  # without a tokenizer, for which the hub is asked in vain
    assert resolve_folder(NAME) == snapshot
    assert Transformer.from_folder(NAME, device="cpu").folder == snapshot


@pytest.mark.parametrize("files, layout", [(NATIVE, "native"), (HUGGINGFACE, "huggingface")])
def test_an_incomplete_cache_offline_names_the_file(hub, cache, monkeypatch, files, layout):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (lost,) = (name for name in files if "2-of" in name)
    snapshot = write_snapshot(cache, {name: hub.models[NAME][name] for name in files - {lost}})
    with pytest.raises(DownloadError) as caught:
        resolve_folder(NAME)
    for part in (NAME, "HF_HUB_OFFLINE is set", str(snapshot), lost, "give its folder"):
        assert part in str(caught.value)
    assert lost.replace("2-of", "1-of") not in str(caught.value)
    assert not hub.requests
    config = {"native": "params.json", "huggingface": "config.json"}[layout]
    for name in files - {config}:
        (snapshot / name).unlink(missing_ok=True)
    with pytest.raises(DownloadError, match=r"lack (consolidated|model).safetensors\."):
        resolve_folder(NAME)
    other = {"native": "huggingface", "huggingface": "native"}[layout]
    with pytest.raises(DownloadError, match="lack (params|config).json, (consolidated|model)"):
        resolve_folder(NAME, layout=other)


@pytest.mark.parametrize(
    "refused, reason",
    [
        ((403, "GatedRepo"), "access is restricted"),
        ((401, "RepoNotFound"), "no such model"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((500, ""), "500"),
        (None, "ConnectError"),
    ],
)
def test_a_failed_download_is_one_error(hub, monkeypatch, refused, reason):
    if refused is None:
        use_hub(monkeypatch, "http://127.0.0.1:9")
    else:
        hub.refused[NAME] = refused
    with pytest.raises(DownloadError) as caught:
        resolve_folder(NAME)
    for part in (f"{NAME}: no such folder here", reason, "HF_HUB_OFFLINE=1", "\n"):
        assert (part in str(caught.value)) == (part != "\n")


def test_a_silent_hub_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DownloadError, match="ReadTimeout"):
            resolve_folder(NAME)


def test_a_full_disk_is_told(hub, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        resolve_folder(NAME)


def test_revisions_that_are_not_there(hub):
    with pytest.raises(DownloadError, match="tiny-7B.v1@v9: .*no such revision"):
        resolve_folder(f"{NAME}@v9")


@pytest.mark.parametrize(
    "files, layout, parts",
    [
        ({"params.json", "consolidated.00.pth"}, None, ["consolidated.00.pth", "pickles"]),
        ({"config.json", "pytorch_model.bin"}, "huggingface", ["pytorch_model.bin", "pickles"]),
        (NATIVE, "huggingface", ["config.json", "'native'"]),
        ({"README.md", *shards("model")}, None, ["holds no params.json", "nor config.json"]),
    ],
)
def test_repositories_without_weights_to_read(hub, files, layout, parts):
    hub.models[NAME] = {name: hub.models[NAME][name] for name in files}
    with pytest.raises(ValueError) as caught:
        resolve_folder(NAME, layout=layout)
    assert all(part in str(caught.value) for part in (NAME, *parts))
    assert not hub.sent()


def test_a_local_path_wins(hub, tmp_path):
    write_native(tmp_path / NAME, tiny_config())
    assert resolve_folder(NAME) == Path(NAME) and not hub.requests
    assert ModelConfig.from_folder(NAME) == tiny_config()


@pytest.mark.parametrize(
    "folder",
    ["name", "./a/b", "/no/where", "a/b/c", "../x", "../../etc", "org/..", "org/../etc", "a\\b/c"]
    + [
        "a/b--c",
        "a--b/c",
        "a/b@../../c",
        "a/b@c/../../d",
        "a/b..c",
        "a/b@/etc",
        "a/b@",
        "a/",
        "/b",
        "a/b\n",
        Path("a/b"),
    ],
)
def test_what_is_no_name_never_reaches_the_hub(hub: Hub, folder):
    with pytest.raises(FileNotFoundError, match="no such folder$"):
        resolve_folder(folder)
    assert not hub.requests
