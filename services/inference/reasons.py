"""Why a MAP brought no result: every `reason_code` of `failure.json`, what it says, and what to do."""

REASONS = {
    # Of the run.
    "application_error": (
        "the application raised an exception, or ended with an exit code other than 0",
        "Mend the application at that place; its log says more.",
    ),
    "deadline": (
        "it did not end within its deadline, and was killed",
        "Set a longer deadline_s in maps.yaml, or timeout in app.json or app.yaml.",
    ),
    "out_of_memory": (
        "it ran out of memory",
        "Ask for more memory in pkg.json or app.yaml (or RADQUEUE_MAP_MEMORY_BYTES), or use a larger machine.",
    ),
    "gpu_out_of_memory": (
        "the GPU's memory did not suffice",
        "Say what it needs as gpuMemory, so that it is reserved, or give it a larger GPU; end what else uses it.",
    ),
    "gpu_lost": ("the GPU does not answer", "Look for Xid in dmesg, and restart the driver or the machine."),
    "crashed": (
        "its process ended by a signal, or left",
        "Its log may hold a C stack; libraries of versions that do not fit are the usual cause.",
    ),
    # Of what it wrote.
    "no_output": (
        "it ended well and wrote nothing that an archive takes",
        "See whether the operators emit and the writer is connected; `outputs: {}` allows files that are no DICOM.",
    ),
    "outputs_missing": (
        "it wrote fewer instances than `outputs:` in maps.yaml asks for, of the modalities named",
        "Mend the application, or `outputs:` in maps.yaml.",
    ),
    "invalid_output": (
        "it wrote DICOM that no archive takes; the attributes named are missing or wrong",
        "Write complete files, each with UIDs of its own.",
    ),
    "attributes_differ": (
        "the attributes named are not those of the study",
        "Copy them exactly: HealthImaging keeps such an instance as non-primary, and no DICOMweb search shows it.",
    ),
    # Of the target.
    "push_rejected": (
        "the archive refused the instances, for the attributes or the DICOM failure reasons named",
        "Mend what the application writes there; the archive's own log says more.",
    ),
    "not_primary": (
        "the archive took the instances, and keeps them as non-primary: the attributes named conflict with the study's",
        "Copy them exactly, or correct what the archive has of the study.",
    ),
}
"""What happened and what to do about it, by reason code; `named` refers to the failure's `where`."""


def explained(reason_code: str) -> tuple[str, str]:
    """Return what happened and what to do; of a code from a later version, that it is not known here."""
    return REASONS.get(reason_code, ("this version of radqueue does not know the reason", "Read its log."))


def several(n: int, noun: str) -> str:
    """Return `1 file` or `2 files`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
