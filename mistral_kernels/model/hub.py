"""Models named as on the Hugging Face hub: `org/name` becomes a folder of the local hub cache.

huggingface_hub downloads, with its own progress bars, and keeps the cache; here it is decided what
to ask it for: one set of weights of a repository that often holds several, and nothing where the
cache has it already.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.layouts import LAYOUTS, Layout, LayoutFiles, check_layout

logger = logging.getLogger("mistral_kernels")

# org/name or org/name@revision. ".." would lead out of the cache, where "--" joins org and name.
HUB_ID = re.compile(
    r"(?!.*\.\.)(?![^@]*--)(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
TOKENIZER = re.compile(r"tekken\.json|tokenizer\.json|tokenizer\.model(\.v\w+)?")
TOKENIZER_DETAILS = re.compile(
    r"(tokenizer_config|special_tokens_map|generation_config)\.json|chat_template\.\w+"
)


class DownloadError(OSError):
    """A model of the hub that is neither in the cache nor can be downloaded."""


class Model(NamedTuple):
    """What is asked for; fields as the arguments of `resolve_folder`."""

    repository: str
    revision: str | None
    layout: Layout | None
    weights: bool


def resolve_folder(
    folder: str | Path, *, layout: Layout | None = None, weights: bool = True
) -> Path:
    """Finds a checkpoint folder: a local one, or that of a model on the Hugging Face hub.

    A complete model in the hub cache is taken from there without asking the hub for a newer one.
    Otherwise one set of weights is downloaded, with its configuration and tokenizer. HF_HOME,
    HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=1 are honoured.

    Args:
        folder: a path, which wins where it exists; or, as a str, `org/name` or `org/name@revision`,
            the revision being a branch, a tag or a whole commit hash.
        layout: "native" or "huggingface"; None: the one that the cache holds, else native where
            the repository has it.
        weights: False: the configuration and the tokenizer are enough.

    Returns:
        The folder.

    Raises:
        TypeError: the folder is no path.
        FileNotFoundError: there is no such path, and it cannot name a model on the hub.
        DownloadError: an OSError; the model is not in the cache and cannot be downloaded. Names
            the reason and the way to work without the hub.
        ValueError: the folder is "", or the repository holds no weights that can be read, or not in
            that layout.
    """
    check_layout(layout)
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a str or a Path, got {type(folder).__name__}")
    if not os.fspath(folder):  # Path("") would be the current folder: a slip of a script
        raise ValueError("folder must be a path or the name of a model, got ''")
    path = Path(folder)
    if path.exists():
        return path
    match = HUB_ID.fullmatch(folder) if isinstance(folder, str) else None
    if match is None:
        raise FileNotFoundError(f"{folder}: no such folder")
    return _find_model(Model(match["repository"], match["revision"], layout, weights), folder)


def _find_model(model: Model, name: str) -> Path:
    """The snapshot in the cache, downloaded as far as it is not there."""
    from huggingface_hub import errors

    snapshot = _cached_snapshot(model)
    missing = _missing(snapshot, model)
    if snapshot and not missing and any(map(TOKENIZER.fullmatch, _names(snapshot))):
        return snapshot
    try:
        downloaded = _download(model, snapshot)
    # HTTPError is the base of what the HTTP library of huggingface_hub raises, RuntimeError what
    # its transfer library does; a full disk and refused connections are OSErrors.
    except (OSError, errors.HTTPError, errors.HFValidationError, RuntimeError) as error:
        if snapshot and not missing:
            logger.info("%s: has no tokenizer, and the hub was no help: %s", snapshot, error)
            return snapshot
        raise _download_error(name, _reason(error), snapshot, missing) from error
    if missing := _missing(downloaded, model):  # if the hub went away in between
        raise _download_error(name, "the hub did not deliver all of it", downloaded, missing)
    return downloaded


def _cached_snapshot(model: Model) -> Path | None:
    """The folder of the cache that holds the revision's configuration, if it does."""
    from huggingface_hub import errors, try_to_load_from_cache

    for layout in LAYOUTS.values():
        try:
            file = try_to_load_from_cache(model.repository, layout.config, revision=model.revision)
        except errors.HFValidationError:
            return None  # the download will say what is wrong with the name
        if isinstance(file, str):
            return Path(file).parent
    return None


def _names(folder: Path | None) -> set[str]:
    """The files of a folder; a link without its file is none."""
    return {path.name for path in folder.iterdir() if path.is_file()} if folder else set()


def _missing(snapshot: Path | None, model: Model) -> list[str]:
    """Files that a snapshot lacks, for the layout that it will be read in."""
    names = _names(snapshot)
    configured = next((name for name, files in LAYOUTS.items() if files.config in names), "native")
    layout = LAYOUTS[model.layout or _begun(names) or configured]
    if not model.weights:
        configs = [layout.config] if model.layout else [w.config for w in LAYOUTS.values()]
        return [] if names & set(configs) else [" or ".join(configs)]
    return [layout.config] * (layout.config not in names) + _missing_weights(
        snapshot, names, layout
    )


def _missing_weights(snapshot: Path | None, names: set[str], layout: LayoutFiles) -> list[str]:
    found = layout.among(names)
    if found == [layout.single]:
        return []
    if not layout.indexed and found:
        total = found[0].removesuffix(".safetensors").rpartition("-")[2]
        width = len(total)
        shards = [
            f"{layout.stem}-{i:0{width}}-of-{total}.safetensors" for i in range(1, int(total) + 1)
        ]
    elif layout.index in found:
        weight_map = read_json(snapshot / layout.index).get("weight_map")
        # What else an index can have wrong is told when the weights are read.
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    else:
        return [layout.index if found else layout.single]
    return [shard for shard in shards if shard not in names]


def _begun(names: Collection[str]) -> Layout | None:
    """The layout of which there are weights, be it a part; None if there are none."""
    return next((name for name, layout in LAYOUTS.items() if layout.among(names)), None)


def _download(model: Model, snapshot: Path | None) -> Path:
    """Downloads what is missing of one set of weights, or of configuration and tokenizer alone."""
    from huggingface_hub import HfApi, constants, snapshot_download

    # Left to itself, huggingface_hub waits for a silent hub for ever.
    found = HfApi().model_info(
        model.repository, revision=model.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    names = {file.rfilename for file in found.siblings or ()}
    layout = LAYOUTS[model.layout or _begun(_names(snapshot)) or _begun(names) or "native"]
    weights = layout.among(names)
    if layout.config not in names or not weights:
        raise ValueError(_unreadable(model, names))
    beside = [n for n in names if TOKENIZER.fullmatch(n) or TOKENIZER_DETAILS.fullmatch(n)]
    files = [layout.config, *sorted(beside), *(weights if model.weights else ())]
    return Path(snapshot_download(model.repository, revision=model.revision, allow_patterns=files))


def _unreadable(model: Model, names: set[str]) -> str:
    """Says what a repository without the weights asked for holds instead."""
    layouts = [name for name in LAYOUTS if model.layout in (None, name)]
    wanted = " nor ".join(
        f"{LAYOUTS[n].config} with {LAYOUTS[n].stem}*.safetensors" for n in layouts
    )
    text = f"{model.repository}: the repository holds no {wanted}"
    others = [n for n in LAYOUTS if n not in layouts and LAYOUTS[n].among(names)]
    if others:
        return f"{text}, but the weights in layout {others[0]!r}"
    pickles = [pickle for files in LAYOUTS.values() for pickle in files.pickles_among(names)]
    return (
        f"{text}, only pickles such as {pickles[0]}, which are not downloaded" if pickles else text
    )


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    known = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
        errors.GatedRepoError: "its access is restricted; ask for it on its page on the hub, then"
        " log in with `hf auth login`",
        errors.RepositoryNotFoundError: "the hub has no such model, or a private one (then log in"
        " with `hf auth login`)",
        errors.RevisionNotFoundError: "it has no such revision",
    }
    text = next((text for kind, text in known.items() if isinstance(error, kind)), None)
    first_line = (str(error).splitlines() or [""])[0]
    return text or f"{type(error).__name__}: {first_line}".removesuffix(".")


def _download_error(
    name: str, reason: str, snapshot: Path | None, missing: list[str]
) -> DownloadError:
    from huggingface_hub import constants

    cached = f"its cached files in {snapshot} lack {', '.join(missing)}"
    if not snapshot:
        cached = f"the cache {constants.HF_HUB_CACHE} does not hold it"
    return DownloadError(
        f"{name}: no such folder here, and as a model of the Hugging Face hub it cannot be"
        f" downloaded: {reason}; {cached}. To work offline, download it on another machine and"
        " give its folder, or copy its cache and set HF_HUB_OFFLINE=1"
    )


def model_name(folder: str | Path) -> str:
    """The name of a checkpoint: its folder's, or for one in the hub cache the repository's.

    >>> model_name("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abcd")
    'org/name'
    >>> model_name("models/large/../tiny")
    'tiny'
    """
    folder = Path(os.path.abspath(folder))  # follows "..", but no links
    repository = folder.parents[1].name if len(folder.parents) > 1 else ""
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name
