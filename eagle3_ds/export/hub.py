"""Uploading exports to the Hugging Face hub, or to what `HF_ENDPOINT` names."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)


def check_push(name: str) -> None:
    """Whether an upload to `name` can begin: before any work, nothing is sent.

    Raises:
        ValueError: `name` is no `owner/name` of the hub, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"--push {name}: whose repository is it? Write owner/name.")
    if not get_token():
        raise ValueError(
            f"--push {name}: nobody is logged in to the hub. Run `hf auth login`, or set the environment "
            "variable HF_TOKEN to a token that may write."
        )


def push_folder(folder: Path, name: str, private: bool) -> str:
    """Upload an export, all files in one commit, into a repository that is made where there is none.

    Args:
        private: make the repository private; one that is there must be.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the repository is public and should not be, the token may not write there, or the hub
            cannot be reached or breaks off. Its files are then what they were before.
    """
    api = HfApi(library_name="eagle3_ds")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError(
                f"--push {name}: the repository is there and public, so nothing was sent. Make it private on "
                "the hub, name another one, or leave --private out."
            )
        found = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}")
    except HfHubHTTPError as error:
        raise ValueError(f"--push {name}: {_reason(error)}") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise ValueError(
            f"--push {name}: {api.endpoint} cannot be reached or broke off ({type(error).__name__}: "
            f"{error}). Nothing was committed; run the command again."
        ) from error
    return str(found.commit_url)


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    told = error.server_message or str(error).splitlines()[0]
    if status in {401, 403}:
        return f"the hub refuses the token ({status}: {told}). Log in with one that may write to it."
    return f"the hub answered {status}: {told}. Nothing was committed; run the command again."
