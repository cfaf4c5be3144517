"""Files that huggingface_hub has fetched to this machine already, in the cache that all programs share."""

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name


def cached_commit(repo: str, revision: str, cache: Path) -> str | None:
    """The commit that a branch or a tag named when it was last fetched; None if it never was."""
    folder = cache / repo_folder_name(repo_id=repo, repo_type=constants.REPO_TYPE_MODEL)
    if ".." in Path(revision).parts or Path(revision).is_absolute():
        return None
    if (folder / "snapshots" / revision).is_dir():
        return revision
    try:
        return (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None


def cached_file(repo: str, commit: str, path: str, cache: Path) -> Path | None:
    """A file of a commit; None if it is not in the cache."""
    found = try_to_load_from_cache(repo, path, cache_dir=cache, revision=commit)
    return Path(found) if isinstance(found, str) else None
