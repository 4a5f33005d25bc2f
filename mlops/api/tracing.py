"""Traces by OpenTelemetry, from the request over the job to sampling and decoding; off unless a receiver is named.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318      by OTLP over HTTP
    OTEL_TRACES_EXPORTER=azure_monitor_opentelemetry_exporter, APPLICATIONINSIGHTS_CONNECTION_STRING=...
                                                           another exporter that is installed, by its name

Without either nothing is set up, and of OpenTelemetry nothing is imported but what FastAPI brings itself. What else
the SDK reads (OTEL_TRACES_SAMPLER, OTEL_BSP_..., OTEL_EXPORTER_OTLP_HEADERS) works as its documentation says. Our spans
hold names of models and jobs, FastAPI's the address of a request; neither says who called.
"""

import os
import threading
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ldm3d import __version__
from ldm3d.errors import ConfigError

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER, OTLP = "OTEL_TRACES_EXPORTER", "otlp_proto_http"
FLUSH_SECONDS = 5.0
"""A receiver that does not answer holds the end of a process no longer."""
UNTRACED = {"/health", "/ready", "/metrics"}

_provider: Any = None
_tracer: Any = None


def start(service: str) -> None:
    """Begin to trace, if a receiver is named.

    Args:
        service: what this process is called in traces, unless OTEL_SERVICE_NAME says otherwise.

    Raises:
        ConfigError: what traces need is not installed, or no exporter has the name that is set.
    """
    global _provider, _tracer
    named = any(os.environ.get(name) for name in ENDPOINTS)
    # What is set to nothing is not set: so OpenTelemetry has it.
    chosen = os.environ.get(EXPORTER) or (OTLP if named else "none")
    if chosen == "none":
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("traces need pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http") from error
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or service})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(_exporter(OTLP if chosen == "otlp" else chosen)))
    _tracer = _provider.get_tracer("ldm3d", __version__)


def _exporter(name: str) -> Any:
    installed = {entry.name: entry for entry in entry_points(group="opentelemetry_traces_exporter")}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise ConfigError(f"{EXPORTER}: no exporter {name} is installed; there are: {known}")
    try:
        return installed[name].load()()
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{EXPORTER}: {name}: {error}") from error


def stop() -> None:
    """Send what has not been sent yet."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)


def of_requests() -> "TelemetryConfig":
    """What FastAPI is told of tracing: its own spans around requests, to where the others go, and nothing else.

    A caller's span, if it sends a `traceparent`, is the request's parent.
    """
    return {
        "tracer_provider": _provider,
        "tracing": _provider is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope["path"] in UNTRACED,
    }


def here() -> str | None:
    """The span that this is in, as a `traceparent`."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def begin(name: str, traceparent: str | None, **attributes: str | int) -> Any:
    """A span that goes on until `end`; None where nothing is traced."""
    return _tracer and _tracer.start_span(name, context=_context(traceparent), attributes=attributes)


def part(whole: Any, name: str, start: int, end: int, **attributes: str | int) -> None:
    """A span inside another one, from `start` to `end` (nanoseconds since 1970)."""
    if whole is not None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(whole)
        _tracer.start_span(name, context=context, start_time=start, attributes=attributes).end(end)


def end(span: Any, state: str, error: str | None = None) -> None:
    """End what `begin` has begun."""
    if span is not None:
        span.set_attribute("ldm3d.state", state)
        _judge(span, error)
        span.end()


def _judge(span: Any, error: str | None) -> None:
    from opentelemetry.trace import StatusCode

    if error is not None:
        span.set_status(StatusCode.ERROR, error)


def _context(traceparent: str | None) -> Any:
    """Of a span in another process; without one, a trace of its own begins."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}, Context())
