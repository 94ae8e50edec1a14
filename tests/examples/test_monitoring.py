"""The dashboard shows what the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sglang.srt.observability import metrics_collector

from sglang_spark import metrics

MONITORING = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "json" / "sglang-spark-dashboard.json"
METRIC = re.compile(r"sglang:\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text())


@pytest.fixture
def exported() -> set[str]:
    names = set()

    class Named:
        def __init__(self, name, **kwargs):
            names.add(name)

    collector = type("Collector", (), {"labels": {}, "_gauge_cls": Named, "_counter_cls": Named})
    metrics.SparkCollector(collector)
    return names


def _shown(dashboard: dict) -> set[str]:
    return {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in METRIC.findall(target["expr"])
    }


def test_every_metric_is_shown_and_none_is_made_up(dashboard, exported):
    source = Path(metrics_collector.__file__).read_text()
    sglang_own = {name for name in METRIC.findall(source) if not name.startswith("sglang:spark")}
    assert {name for name in _shown(dashboard) if name.startswith("sglang:spark")} == exported
    assert _shown(dashboard) - exported <= sglang_own


def test_every_metric_is_documented(exported):
    assert exported == set(METRIC.findall((MONITORING / "README.md").read_text())) - {"sglang:spark"}


def test_panels_do_not_overlap(dashboard):
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
