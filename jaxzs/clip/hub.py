"""Where a checkpoint is: one in the package, a local path, or the HuggingFace hub and its cache."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable
from pathlib import Path

from jaxzs.clip.open_clip import CONFIG_FILE as OPEN_CLIP_CONFIG
from jaxzs.clip.weights import OPEN_CLIP_FILES, WEIGHT_FILES, is_dual_encoder, shard_names, weight_file
from jaxzs.errors import CheckpointError

# What is used besides the weights.
_SMALL_FILES = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "vocab.txt",  # of BERT
    "README.md",
    "model_card.json",
)
_HUB_ID = re.compile(r"[a-z0-9][\w.-]*(/[a-z0-9][\w.-]*)?", re.ASCII | re.IGNORECASE)  # the oldest ids have no owner
EMBEDDED = ("demo", "art")  # digits, letters and shapes; things that artists drew
_OTHERWISE = "Give the path of a folder with config.json and the weights instead, or the built-in 'demo' or 'art'."


def find_checkpoint(
    name_or_path: str | Path = "demo", *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder (or weight file) that a name stands for, downloaded from the hub where needed.

    name_or_path: "demo" and "art" are the checkpoints inside this package; then an existing local path; then a hub id
        such as "openai/clip-vit-base-patch32". A local folder that is called demo is "./demo".
    revision: branch, tag or commit on the hub. Pin a commit for results that others should reproduce.
    local_files_only: take hub ids from the cache alone. HF_HUB_OFFLINE=1 does the same.

    From the hub only the configuration, the tokenizer and one format of the weights are fetched: the first of
    `WEIGHT_FILES` that the repository has, with its shards.

    Raises `CheckpointError` saying what was tried when there is no such checkpoint or the hub cannot be reached.

    >>> (clip.find_checkpoint("demo") / "config.json").is_file()
    True
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise CheckpointError(f"a checkpoint is named by a text or a path, not by {name_or_path!r:.60}. {_OTHERWISE}")
    name = str(name_or_path)
    if name in EMBEDDED:
        return _packaged(name)
    path = Path(name_or_path).expanduser()
    if name and os.path.exists(path):  # "" would be the current folder
        _refuse_hiding_folder(name_or_path, path)
        return path
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{name or repr(name)}: no such file or folder, and not a hub id (owner/name). {_OTHERWISE}"
        )
    return _from_hub(name, revision, local_files_only)


def _refuse_hiding_folder(name: str | Path, path: Path) -> None:
    """A folder without a checkpoint may stand in the way of the hub id that was meant."""
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name) or "/" not in name or not path.is_dir():
        return
    if not {"config.json", OPEN_CLIP_CONFIG, *WEIGHT_FILES, *OPEN_CLIP_FILES} & set(os.listdir(path)):
        raise CheckpointError(
            f"{name}: a local folder of this name, {path.resolve()}, hides the hub id and holds no checkpoint. "
            f"Move or rename the folder, or work elsewhere, to load from the hub; write ./{name} for the folder"
        )


def _packaged(name: str) -> Path:
    folder = Path(str(importlib.resources.files("jaxzs") / "assets" / name))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: the built-in checkpoint is missing; install jaxzs again")
    return folder


def _from_hub(repo: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "local_files_only is set" if local_files_only else "HF_HUB_OFFLINE is set"
        return _from_cache(repo, revision, f"the hub was not asked ({why})")
    try:
        return _download(repo, revision)
    except CheckpointError:
        raise
    except Exception as error:  # requests' or httpx's errors or the hub's own, depending on versions
        refused = _refusal(repo, revision, error)
        if refused is not None:
            raise CheckpointError(refused) from error
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return _from_cache(repo, revision, f"the hub at {constants.ENDPOINT} could not be reached ({reason})")


def _download(repo: str, revision: str | None) -> Path:
    """One snapshot of the small files and one format of the weights, chosen from the repository's listing."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    listed = {entry.rfilename for entry in info.siblings or ()}

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=info.sha))  # of the commit that was listed

    weights = _chosen_weights(repo, listed, fetch)
    wanted = [*_SMALL_FILES, weights]
    if weights.endswith(".index.json"):
        wanted += shard_names(fetch(weights))
    # The revision as the user gave it, so that the cache knows that name too when the hub is out of reach.
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _chosen_weights(repo: str, listed: set[str], fetch: Callable[[str], Path]) -> str:
    """The weight file of a repository, from its listing and its config.json, before anything large is fetched.

    timm's repositories hold a whole open_clip model beside timm's image tower, LAION's hold both layouts whole.
    """
    dual = "config.json" in listed and is_dual_encoder(fetch("config.json"))
    files = (*WEIGHT_FILES,) * dual + (*OPEN_CLIP_FILES,) * (OPEN_CLIP_CONFIG in listed)  # times a bool: all or none
    if (weights := next((name for name in files if name in listed), None)) is not None:
        return weights
    if "config.json" in listed and not dual and OPEN_CLIP_CONFIG not in listed:
        raise CheckpointError(f"{repo}: its config.json is not that of a CLIP or SigLIP. {_OTHERWISE}")
    config = f"config.json or {OPEN_CLIP_CONFIG}"
    raise CheckpointError(
        f"{repo}: not a repository of HuggingFace's or open_clip's layout: it lacks "
        f"{'weights (' + ', '.join(files) + ')' if files else config}. {_OTHERWISE}"
    )


def _refusal(repo: str, revision: str | None, error: Exception) -> str | None:
    """What to tell when the hub did answer, with a no; None when it could not be reached."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo}: a gated repository; accept its terms on the hub and run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: no revision {revision!r} on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: neither a local path nor a public repository on the hub (a private one needs "
            f"`hf auth login`). {_OTHERWISE}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: not a valid hub id: {error}"
    return None


def _from_cache(repo: str, revision: str | None, why: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        missing = "holds no copy"
        for name in ("config.json", OPEN_CLIP_CONFIG):
            if isinstance(config := try_to_load_from_cache(repo, name, revision=revision), str):
                weight_file(folder := Path(config).parent)  # raises where there are none
                return folder
    except HFValidationError as error:
        raise CheckpointError(f"{repo}: not a valid hub id: {error}. {_OTHERWISE}") from error
    except CheckpointError:
        missing = "holds a copy without weights (an interrupted download)"
    shown = repo if revision is None else f"{repo} at revision {revision!r}"
    raise CheckpointError(
        f"{shown}: no local path of that name; {why}; the cache {constants.HF_HUB_CACHE} {missing}. Where there is a "
        f"network, `hf download {repo} --local-dir FOLDER` fetches it, to be copied here. {_OTHERWISE}"
    )
