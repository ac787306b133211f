"""How many examples of a property are drawn: few in `make test`, all of them under `--hypothesis-profile=long`."""

from hypothesis import settings

SHORT, LONG = "short", "long"
SHARE = 5
"""The short profile draws one example in so many."""
DEFAULT_EXAMPLES = 100


def register_profiles() -> None:
    """Make both profiles known, and the short one the default; pytest's option loads another one afterwards."""
    settings.register_profile(SHORT, max_examples=DEFAULT_EXAMPLES // SHARE)
    settings.register_profile(LONG, max_examples=DEFAULT_EXAMPLES * SHARE)
    settings.load_profile(SHORT)


def examples(of_long: int) -> int:
    """Return how many examples to draw of a property that has so many in the long profile."""
    return of_long if settings.get_current_profile_name() == LONG else max(1, of_long // SHARE)
