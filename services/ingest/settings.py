"""The settings of ingest, each read once from the environment."""

from pydantic import Field, Json, SecretStr

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
    """Most files in one zip."""
    max_zip_bytes: int = Field(default=8192 * MIB, gt=0)
    """Largest unpacked size of one zip."""
    max_zip_ratio: float = Field(default=200, gt=1)
    """Largest unpacked over packed size of one member of a zip."""
    array_size: int = Field(default=64, ge=8, le=1024)
    """Height and width of the slices in training arrays."""
    array_windows: Json[dict[str, tuple[float, float]]] = Field(default={"CT": (-1000.0, 1000.0)})
    """Modality values that become -1 and 1 in training arrays, by modality, as JSON; others use percentiles."""
    array_low_percentile: float = Field(default=0.5, ge=0, lt=50)
    """Percentile of a series that becomes -1 where its modality has no window."""
    array_high_percentile: float = Field(default=99.5, gt=50, le=100)
    """Percentile of a series that becomes 1 where its modality has no window."""
    patient_secret: SecretStr = SecretStr("radqueue")
    """Key of the hash that stands for a patient in training data; set and keep your own to make it irreversible."""
