"""The reporter's settings, each read once from the environment."""

from pydantic import Field

from shared.config import ServiceSettings


class ReporterSettings(ServiceSettings):
    """What the reporter needs beyond what every service does."""

    slots: int = Field(default=100, ge=1, le=100)
    """Messages handled at the same time; they share a write, so more slots mean fewer and larger objects."""
    log_events: int = Field(default=500, ge=1)
    """Events that are written to the log at once, without waiting for more."""
    log_wait_s: float = Field(default=0.2, ge=0, le=10)
    """Seconds that the first event of a write waits for others."""
    recent_events: int = Field(default=20_000, ge=1)
    """Ids of written events that are remembered, so that a repeated delivery is not counted again."""
    largest_image_bytes: int = Field(default=8 * 1024 * 1024, ge=0)
    """Image grids above this size are named in the report's page, not embedded."""
