"""Put a finished result on the Hugging Face hub."""

from pathlib import Path

from dashq.errors import OutputError
from dashq.results.report import REPORT


def push(folder: Path, repository: str) -> str:
    """Upload a result to a repository, which is made where it is not there; returns its address.

    Raises `OutputError` for a folder that is unfinished, and for what the hub says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (folder / REPORT).exists():
        raise OutputError(f"{folder} is no finished result: it has no {REPORT}")
    try:
        api = HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Quantized with dashq")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OutputError(f"cannot push {folder} to {repository!r}: {str(error).splitlines()[0]}") from error
    return address
