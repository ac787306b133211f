"""What is done with the images of each dataset: `datasets.yaml`. Values in, values out; `read` is given its text.

```yaml
default:                        # of datasets that are not named below, and what those leave out
  array:
    size: 64                    # height and width of the slices in training arrays
    windows: {CT: [-1000, 1000]}    # modality values that become -1 and 1, by Modality
    percentiles: [0.5, 99.5]    # of the dataset's first series of a Modality that has no window
    leave_out: [blank, localizer]
  deidentify: false
datasets:
  chest-research:
    array: {size: 128}
    deidentify:                 # the basic profile of PS3.15, with these options; `{}` or `true` for none
      options: [retain_modified_dates, clean_descriptors]
      studies: false            # true: what is stored in studies/ is de-identified as well, and nothing of it is pushed
      blank:                    # regions of the picture to black out: left, top, width and height, in pixels
        - {when: {Modality: US, Rows: 600, Columns: 800}, regions: [[0, 0, 800, 60]]}
```
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from services.ingest.deidentification import Option
from shared.config import Misconfigured
from shared.messages import Name
from shared.yaml_tables import read_table

SECRET_LENGTH = 16
"""Characters of a secret that is worth the name; the default is shorter."""
Scalar = str | int | float
LeaveOut = Literal["blank", "localizer"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise ValueError("the first number must be below the second")
    return pair


def _known(keyword: str) -> str:
    if tag_for_keyword(keyword) is None:
        raise ValueError("not a DICOM keyword")
    return keyword


Finite = Annotated[float, Field(allow_inf_nan=False)]
Pair = Annotated[tuple[Finite, Finite], AfterValidator(_rising)]
Modality = Annotated[str, Field(pattern="^[A-Z][A-Z0-9_ ]{0,15}$")]
"""A code string (PS3.5 section 6.2)."""
Percentile = Annotated[float, Field(ge=0, le=100)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class ArrayRules(_Strict):
    """How training arrays are made."""

    size: int = Field(default=64, ge=8, le=1024)
    windows: Mapping[Modality, Pair] = {"CT": (-1000.0, 1000.0)}
    percentiles: Annotated[tuple[Percentile, Percentile], AfterValidator(_rising)] = (0.5, 99.5)
    leave_out: tuple[LeaveOut, ...] = ("blank", "localizer")


class BlankRule(_Strict):
    """Where the images of one kind of device show texts; written by somebody who has looked at them."""

    when: Mapping[Annotated[str, AfterValidator(_known)], Scalar | list[Scalar]] = Field(min_length=1)
    regions: tuple[tuple[NotNegative, NotNegative, Positive, Positive], ...] = Field(min_length=1)

    def applies(self, dataset: Dataset) -> bool:
        """Tell whether the instance has each of the values, or one of several."""
        return all(_has(dataset, keyword, wanted) for keyword, wanted in self.when.items())

    def fits(self, dataset: Dataset) -> bool:
        """Tell whether each region touches the picture; else it is of another size, and its texts are elsewhere."""
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        return all(left < columns and top < rows for left, top, _, _ in self.regions)


def _has(dataset: Dataset, keyword: str, wanted: Scalar | list[Scalar]) -> bool:
    value = dataset.get(keyword)
    values = value if isinstance(value, MultiValue) else [value]
    allowed = {str(one) for one in (wanted if isinstance(wanted, list) else [wanted])}
    return any(str(one).strip() in allowed for one in values if one is not None)


class Deidentification(_Strict):
    """The basic profile of PS3.15 Annex E and its options."""

    options: tuple[Option, ...] = ()
    studies: bool = False
    """Whether instances are de-identified before they are stored; else only what training data tell of them is."""
    blank: tuple[BlankRule, ...] = ()

    def fingerprint(self) -> str:
        """Return a text that is the same for the same rules."""
        return self.model_dump_json()


def _spelled_out(given: object) -> object:
    return {} if given is True else None if given is False else given


class DatasetRules(_Strict):
    """What is done with the images of one dataset."""

    array: ArrayRules = ArrayRules()
    deidentify: Annotated[Deidentification | None, BeforeValidator(_spelled_out)] = None


class Datasets(_Strict):
    """All of `datasets.yaml`."""

    default: DatasetRules = DatasetRules()
    datasets: Mapping[Name, DatasetRules] = {}

    def of(self, dataset: str) -> DatasetRules:
        """Return the rules of a dataset; what it leaves out is as in `default`."""
        own = self.datasets.get(dataset)
        if own is None:
            return self.default
        changed = {name: getattr(own.array, name) for name in own.array.model_fields_set}
        deidentify = own.deidentify if "deidentify" in own.model_fields_set else self.default.deidentify
        return DatasetRules(array=self.default.array.model_copy(update=changed), deidentify=deidentify)


def read(text: str, secret: str) -> Datasets:
    """Read `datasets.yaml`; `secret` is the key of all pseudonyms.

    Raises:
        Misconfigured: with one line per place that is wrong; or the secret is no secret, and a dataset needs one.
    """
    found = read_table(text, Datasets, file="datasets.yaml")
    on = [rules for rules in (found.default, *found.datasets.values()) if rules.deidentify is not None]
    if on and len(secret) < SECRET_LENGTH:
        why = "a dataset is de-identified, whose pseudonyms anybody could find without a secret of your own"
        raise Misconfigured(f"RADQUEUE_PATIENT_SECRET: {why}; set {SECRET_LENGTH} characters or more.")
    return found
