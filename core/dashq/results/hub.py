"""Put a finished result on the Hugging Face hub."""

from pathlib import Path

import yaml

from dashq.errors import OutputError, cause
from dashq.model.location import CARD
from dashq.results.card import for_repository, published
from dashq.results.folder import RECIPE
from dashq.results.report import REPORT, read_report


def check_repository(repository: str) -> None:
    """Raise an `OutputError` for what no repository can be called, and where the hub would not know who asks.

    For callers who have work to do before they push: nothing is asked of the hub.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported without a word

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(f"{repository!r} cannot name a repository of the hub: {cause(error)}") from error
    if get_token() is None:
        raise OutputError(
            f"cannot push to {repository!r} without a token of the hub: `hf auth login` keeps one, or set HF_TOKEN"
        )


def push(folder: Path, repository: str) -> str:
    """Upload a result to a repository, which is made where it is not there; returns its address.

    Only files that the report lists are sent; the recipe goes without the folders of this machine, and the
    card's code opens the repository. Raises `OutputError`
    for a folder that is unfinished, and for whatever the hub or the network says.
    """
    from huggingface_hub import HfApi

    if not (folder / REPORT).exists():
        raise OutputError(f"{folder} is no finished result: it has no {REPORT}")
    report = read_report(folder)
    try:
        recipe = published(yaml.safe_load((folder / RECIPE).read_text()), report.base_model)
        card = (folder / CARD).read_text(encoding="utf-8")
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        texts = {
            RECIPE: yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
            CARD: for_repository(card, recipe["output"], address.repo_id),
        }
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            allow_patterns=[name for name in report.files if name not in texts],
            commit_message="Quantized with dashq",
        )
        for name, text in texts.items():
            api.upload_file(
                repo_id=address.repo_id,
                path_or_fileobj=text.encode(),
                path_in_repo=name,
                commit_message=f"The {'recipe' if name == RECIPE else 'card'} of this result",
            )
    except Exception as error:  # of the hub's package, of the network under it, or of a recipe that was changed
        raise OutputError(
            f"cannot push to {repository!r}: {cause(error)}. The result is whole in {folder}; "
            f"`hf upload {repository} {folder}` sends it as it is"
        ) from error
    return str(address)
