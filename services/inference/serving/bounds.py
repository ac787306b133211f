"""How MAPs are run, as the worker's settings and the routing table say it."""

from services.inference.routing import Route
from services.inference.serving.runner import Bounds, Serving
from services.inference.settings import InferenceSettings


def bounds_of(settings: InferenceSettings, gpus: tuple[str, ...] = ()) -> Bounds:
    """Return what every MAP of this worker may use."""
    return Bounds(
        deadline_s=settings.deadline_s,
        start_deadline_s=settings.start_deadline_s,
        recycle_after=settings.recycle_after,
        growth_bytes=settings.map_growth_bytes,
        memory_bytes=settings.map_memory_bytes,
        processes=settings.map_processes,
        gpus=gpus,
    )


def serving_of(route: Route) -> Serving:
    """Return how a MAP is to be run, as `maps.yaml` says it."""
    return Serving(isolation=route.isolation, deadline_s=route.deadline_s)
