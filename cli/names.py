"""Names of datasets, classes and requests, as people give them."""

from pydantic import TypeAdapter, ValidationError

from shared.messages import Name
from shared.operations.refused import WrongUsage

NAME: TypeAdapter[str] = TypeAdapter(Name)


def name(text: str) -> str:
    """Return a name of a dataset, a class or a request. Raises `WrongUsage` if it is none."""
    try:
        return NAME.validate_python(text)
    except ValidationError:
        raise WrongUsage(f"{text} is no name: use letters, digits, '_', '.' and '-', at most 128") from None
