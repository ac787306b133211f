"""The settings of ingest, each read once from the environment."""

from pydantic import Field, SecretStr

from shared.config import ServiceSettings

MIB = 1024 * 1024


class IngestSettings(ServiceSettings):
    """What ingest needs beyond what every service does."""

    quiet_s: float = Field(default=60, gt=0, le=890)
    """Seconds without a new instance after which a series counts as complete."""
    max_settle_s: float = Field(default=900, gt=0)
    """Seconds after which a series that still grows is taken as it is, at most once in that time."""
    decoders: int = Field(default=2, ge=1, le=64)
    """Child processes that read files at the same time, and as many that read series."""
    decode_memory_bytes: int = Field(default=6144 * MIB, ge=1024 * MIB)
    """Address space of one of them."""
    decode_cpu_s: int = Field(default=120, ge=1)
    """Processor seconds for one file."""
    decode_deadline_s: float = Field(default=180, gt=0)
    """Wall seconds for one file."""
    series_cpu_s: int = Field(default=600, ge=1)
    """Processor seconds for describing a series, and for making its training array."""
    series_deadline_s: float = Field(default=600, gt=0)
    """Wall seconds for describing a series, and for making its training array."""
    max_upload_bytes: int = Field(default=4096 * MIB, gt=0)
    """Largest object that is downloaded."""
    max_inflated_bytes: int = Field(default=1024 * MIB, gt=0)
    """Largest data set that a deflated file may hold."""
    max_pixel_bytes: int = Field(default=1024 * MIB, gt=0)
    """Largest decompressed pixel data of one instance."""
    max_frames: int = Field(default=20_000, gt=0)
    """Most frames of one instance."""
    max_zip_entries: int = Field(default=20_000, gt=0)
    """Most files in one archive."""
    max_zip_bytes: int = Field(default=8192 * MIB, gt=0)
    """Largest unpacked size of one archive."""
    max_zip_ratio: float = Field(default=200, gt=1)
    """Largest unpacked over packed size of a member of a zip, and of a gzipped tar."""
    datasets_file: str = ""
    """`datasets.yaml`: how the training arrays of each dataset are made, and whether it is de-identified."""
    patient_secret: SecretStr = SecretStr("radqueue")
    """Key of all that stands for a patient, an instance or a date; set and keep your own to make it irreversible."""
