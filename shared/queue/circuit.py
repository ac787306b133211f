"""Pauses polling when everything fails in the same way: most likely nothing is wrong with the messages."""

FAILURES = 10
"""So many endings in a row for one and the same reason, and none that was good, open the circuit."""
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Circuit:
    """Counts endings. While it is open one message at a time is let through, after ever longer pauses."""

    def __init__(self) -> None:
        """Begin closed."""
        self._reason: str | None = None
        self._alike = 0

    @property
    def is_open(self) -> bool:
        """Whether everything failed alike lately."""
        return self._alike >= FAILURES

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next poll."""
        if not self.is_open:
            return 0.0
        doublings = min(self._alike - FAILURES, 10)  # an outage of a day would make a power that no float holds
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**doublings)

    def note(self, reason: str | None) -> bool:
        """Note how a message ended, None being well; tells whether that opened the circuit."""
        before = self.is_open
        self._alike = self._alike + 1 if reason is not None and reason == self._reason else int(reason is not None)
        self._reason = reason
        return self.is_open and not before
