"""The routing table while a worker runs: read again every few seconds, and used once it can be."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.inference.routing import Route, RoutingTable, read
from services.inference.serving.place import Place
from shared import metrics as declared
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.log import get_logger
from shared.metrics import Metrics

Require = Callable[[Iterable[Route], str], None]
"""Sees that this worker has what the routes name; raises `Misconfigured` if not. Its second argument names the file."""
log = get_logger()


@dataclass(slots=True, kw_only=True)
class WatchedTable:
    """The routing table, where it lies, and the routes of its newest usable text."""

    place: Place
    require: Require
    metrics: Metrics
    routes: dict[str, Route] = field(default_factory=dict)
    """The routes of the newest table that can be used, by the MAP's name."""
    _text: str = ""
    _refusal_logged: str = ""
    """The fault of the table at the last look, which is logged only once; empty if it had none."""

    async def read(self) -> None:
        """Read the table. Raises `Misconfigured` if it cannot be had or used, and `Unavailable`."""
        self._text = await self.place.text()
        self.routes = self._parsed(self._text)

    async def read_again(self) -> None:
        """Take the table as it is now; one that cannot be used changes nothing, and is logged once."""
        try:
            text = await self.place.text()
        except (Misconfigured, Unavailable) as error:
            self._refuse(str(error))
            return
        if text == self._text:
            self._refusal_logged = ""
            return
        self._text = text
        try:
            self.routes = self._parsed(text)
        except Misconfigured as error:
            self._refuse(str(error))
            return
        log.info("maps.read", maps=sorted(self.routes))

    def _refuse(self, why: str) -> None:
        if why == self._refusal_logged:
            return
        self._refusal_logged = why
        log.error("maps.refused", why=why.splitlines())
        self.metrics.put(declared.ROUTING_TABLES_REFUSED, 1)

    def _parsed(self, text: str) -> dict[str, Route]:
        table: RoutingTable = read(text, self.place.file)
        self.require(table.maps, self.place.file)
        return {route.name: route for route in table.maps}
