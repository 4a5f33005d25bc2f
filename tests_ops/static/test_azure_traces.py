"""Azure Monitor's exporter, which azure-ai-ml brings along, is found by the name that the monitoring page gives."""

import pytest

from mlops.api import tracing


def test_the_exporter_of_azure_monitor_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "00000000-0000-0000-0000-000000000000"
    monkeypatch.setenv("APPLICATIONINSIGHTS_CONNECTION_STRING", f"InstrumentationKey={key}")
    monkeypatch.setenv("APPLICATIONINSIGHTS_STATSBEAT_DISABLED_ALL", "true")
    exporter = tracing._exporter("azure_monitor_opentelemetry_exporter")
    assert type(exporter).__name__ == "AzureMonitorTraceExporter"
    exporter.shutdown()
