"""An analysis survives being written down, and a changed one does not."""

import json
from pathlib import Path

from analyses import analysis, measured
from dashq.measuring.analysis import Analysis

MEASURED = analysis([measured("a", {2: 0.5, 4: 0.1}), measured("b", {2: 0.25})])


def test_an_analysis_survives_being_written_down(tmp_path: Path) -> None:
    assert MEASURED.save(tmp_path) == tmp_path / "analysis.json"
    assert Analysis.load(tmp_path) == MEASURED
    assert [path.name for path in tmp_path.iterdir()] == ["analysis.json"]
    assert Analysis.load(tmp_path / "absent") is None


def test_an_analysis_that_somebody_changed_is_none(tmp_path: Path) -> None:
    path = MEASURED.save(tmp_path)
    content = json.loads(path.read_text())
    content["layers"][0]["choices"][0]["sensitivity"] *= 2
    path.write_text(json.dumps(content))
    assert Analysis.load(tmp_path) is None


def test_layers_are_known_by_their_names() -> None:
    assert [*MEASURED.by_name] == ["a", "b"]
    assert MEASURED.by_name["b"].layer.columns == 32
