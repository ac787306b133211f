"""What an operation raises where it cannot be done; the text is for the person who asked."""


class Refused(Exception):  # noqa: N818 - it states what was not done
    """Something was asked for that cannot be had; the text says what, for people."""


class WrongUsage(Refused):
    """What was asked for cannot be meant."""
