"""W3C trace context through the bodies of events (https://www.w3.org/TR/trace-context/), by the OpenTelemetry API.

Without an OpenTelemetry SDK the API records nothing, and the trace id is carried on all the same. To record spans,
install an SDK and run the service under it: `opentelemetry-instrument python -m services.ingest`.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

HEADER = "traceparent"
_PROPAGATOR = TraceContextTextMapPropagator()
_TRACER = trace.get_tracer("radqueue.queue")


def new_traceparent() -> str:
    """Return a trace context with a new trace id."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def current_traceparent() -> str:
    """Return the trace context of the message being handled, or a new one."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(HEADER) or new_traceparent()


@contextmanager
def handling(name: str, traceparent: str | None) -> Iterator[None]:
    """Continue the message's trace, or begin one; the trace id is bound to the log."""
    context = _PROPAGATOR.extract({HEADER: traceparent or new_traceparent()})
    span = _TRACER.start_span(name, context, trace.SpanKind.CONSUMER)
    token = attach(trace.set_span_in_context(span, context))
    structlog.contextvars.bind_contextvars(trace_id=f"{span.get_span_context().trace_id:032x}")
    try:
        yield
    finally:
        detach(token)
        span.end()
