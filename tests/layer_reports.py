"""Reports of layers for tests that write no result."""

from typing import Any

from dashq.results.report import LayerReport


def layer_report(name: str = "model.layers.0.mlp.up_proj", **changes: Any) -> LayerReport:
    """What a run says of a small layer, with changes."""
    usual: dict[str, Any] = {"rows": 80, "columns": 48, "bits": 3, "group_size": 16, "ordered": False, "bytes": 1}
    figures: dict[str, Any] = {"tokens": 1, "error": 0.0, "minmax_error": 0.0, "seconds": 0.0}
    names: dict[str, Any] = {"digest": "", "solver": "irls", "estimator": "diagonal"}
    return LayerReport(name=name, **(usual | figures | names | changes))
