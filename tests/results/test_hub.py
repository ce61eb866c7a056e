"""A finished result is uploaded to the Hugging Face hub."""

from pathlib import Path
from typing import Any

import pytest

from commands import call
from format_results import FormatResults


def test_push_uploads_a_finished_result_alone(
    results: FormatResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, exist_ok: bool) -> str:
            calls.append(("create", (repository, exist_ok)))
            return f"https://hub.example/{repository}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", (repo_id, folder_path)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    outcome = call("convert", results["metal"], "--to", "mlx", "--output", tmp_path / "new", "--push-to-hub", "me/mine")
    assert outcome.code == 0, outcome.errors
    assert "https://hub.example/me/mine" in outcome.output
    assert calls == [("create", ("me/mine", True)), ("upload", ("me/mine", tmp_path / "new"))]
