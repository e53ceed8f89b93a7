"""The models in the hub's cache, by what their files there say. Nothing is fetched."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import CLIP_NAMES, Checkpoint
from gridprune_cli.vlm.support import quantization, unsupported


@dataclass(frozen=True)
class CachedModel:
    """A snapshot of a hub model.

    name    by which it is found as a `model`
    family  the model_type of its config.json, where it has one
    bytes   of its files
    reason  why it can't be used as a `model`; empty where it can
    """

    name: str
    family: str | None
    bytes: int
    reason: str


def list_cached() -> tuple[list[CachedModel], list[str]]:
    """The models in the hub's cache, by name, and what is wrong with folders in it that can't be read.

    A revision that no branch or tag leads to is left out, unless the repository has no other.
    """
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError, OSError):  # there is none, or it can't be read
        return [], []
    models = []
    for repo in cache.repos:
        if repo.repo_type != "model":
            continue
        named = [(ref, revision) for revision in repo.revisions for ref in revision.refs]
        for ref, revision in named or [(revision.commit_hash, revision) for revision in repo.revisions]:
            name = repo.repo_id if ref == "main" else f"{repo.repo_id}@{ref}"
            models.append(_look_into(name, revision.snapshot_path, revision.commit_hash, revision.size_on_disk))
    return sorted(models, key=lambda model: model.name), [str(broken) for broken in cache.warnings]


def _look_into(name: str, folder: Path, commit: str, size: int) -> CachedModel:
    checkpoint = Checkpoint(name, folder, commit)
    try:
        family = str(checkpoint.family)
    except FileNotFoundError:
        return CachedModel(name, None, size, "no config.json, so no model in transformers' format")
    except (OSError, ValueError, KeyError, TypeError):
        return CachedModel(name, None, size, "its config.json can't be read, or names no model_type")
    if family in CLIP_NAMES:
        reason = f"a {CLIP_NAMES[family]}, for relevance alone: name it as `clip`"
    else:
        try:
            reason = unsupported(checkpoint.config) or checkpoint.lacks()
            if not reason and (stored := quantization(checkpoint.config)):
                from gridprune_cli.vlm.placement import place  # loads torch, which the others do without

                reason = stored.lacks(place("auto", "auto", name).device)
        except (BadInput, AttributeError, TypeError) as fault:  # its settings are of the wrong kind
            reason = str(fault)
    return CachedModel(name, family, size, reason)
