"""Every code that ingest gives: why an upload or a message was refused, and what was noticed in what was taken."""

REASONS = {
    # Of the object.
    "bad_dataset_name": "The folder under incoming/ is no dataset name. Use letters, digits, '_', '.' and '-'.",
    "not_dicom": "Neither a DICOM file nor a zip. Upload the file that the scanner or the PACS wrote.",
    "too_large": "Reading it takes more than the limits allow. Raise RADQUEUE_MAX_* if the file is legitimate.",
    "deadline": "Reading it took longer than allowed. Raise RADQUEUE_DECODE_DEADLINE_S if the file is legitimate.",
    "decoder_crashed": "A decoder crashed on it. The file is probably damaged; keep it for a bug report.",
    "unreadable": "Its structure cannot be read. Export it again.",
    # Of a zip.
    "zip_damaged": "The zip, or a member of it, is damaged. Make it again.",
    "zip_encrypted": "The zip, or a member of it, is encrypted. Upload it without a password.",
    "zip_in_zip": "A zip inside a zip is not opened. Upload the inner one.",
    "zip_too_large": "More members or more bytes than the limits allow. Split it, one study per zip.",
    "zip_ratio": "A member expands beyond every real image: a decompression bomb.",
    "zip_unsupported": "A member is compressed by a method other than deflate. Make the zip with deflate.",
    # Of a DICOM file.
    "truncated": "The file ends before its data set does. Upload it again.",
    "dicomdir": "A DICOMDIR only lists other files. Upload those, or a zip of all.",
    "missing_uid": "StudyInstanceUID, SeriesInstanceUID or SOPInstanceUID is missing.",
    "invalid_uid": "One of these UIDs is not made of digits and dots, or is longer than 64.",
    "missing_sop_class": "No SOPClassUID, and neither the file meta group nor the modality tells it.",
    "unsupported_transfer_syntax": "This transfer syntax is not read (video, for instance). Export it in another one.",
    "bad_image_header": "Rows, Columns, BitsAllocated and their like are missing or contradict each other.",
    "missing_pixel_data": "An image without pixels. Export it again, or upload the original.",
    "frame_count": "There are fewer frames than NumberOfFrames says.",
    "frame_mismatch": "A compressed frame has another size or depth than the header says.",
    "frame_damaged": "A compressed frame cannot be decoded.",
    "conflicting_duplicate": "Another data set is stored under this SOPInstanceUID. Give the changed one a new UID.",
}
"""Why an upload, or a member of a zip, was refused, and what its owner can do."""

DEAD_LETTERS = {
    # Of an upload's notification.
    "object_gone": "The uploaded object was deleted before it was read. Upload it again.",
    "other_bucket": "The notification is about another bucket than RADQUEUE_BUCKET.",
    # Of a series; its instances stay stored, and it settles when the message is sent again or another instance comes.
    "series_gone": "No instance of the series is stored any more.",
    "series_deadline": "Describing the series took longer than RADQUEUE_SERIES_DEADLINE_S.",
    "series_cpu_limit": "Describing the series took more processor time than RADQUEUE_SERIES_CPU_S.",
    "series_out_of_memory": "Describing the series took more memory than RADQUEUE_DECODE_MEMORY_BYTES.",
    "series_crashed": "The process that described the series died. Keep the series for a bug report.",
    "series_raised": "Describing the series failed; the log names the place. Keep the series for a bug report.",
}
"""Why a message of ingest lies in the dead-letter queue, and what to do."""

WARNINGS = {
    # Of an instance.
    "sop_class_restored": "SOPClassUID was missing and was taken from the file meta group or from the modality.",
    "sop_instance_restored": "SOPInstanceUID was missing and was taken from the file meta group.",
    "preamble_missing": "The file has no Part 10 preamble.",
    "meta_missing": "The file has no transfer syntax; it was found from the bytes.",
    "meta_mismatch": "The file meta group names another instance than the data set; the data set is believed.",
    "vr_mismatch": "The data set is not encoded as its transfer syntax says; the bytes are believed.",
    "trailing_bytes": "Bytes after the data set were dropped.",
    "element_unreadable": "An element's value cannot be converted; its bytes are kept with VR UN.",
    "bits_stored_corrected": "The pixel values take more bits than BitsStored said.",
    "excess_pixel_data": "There is more pixel data than the header says.",
    "icon_removed": "A compressed icon was removed with the compression of the image.",
    # Of a series.
    "conflicting_instances": "Two data sets with one SOPInstanceUID were stored at the same moment; the older is used.",
    "gantry_tilt": "A tilted gantry sheared the slices against their normal: a stack of them is no upright volume.",
    "tilt_tag_mismatch": "GantryDetectorTilt says another angle than the positions.",
    "sheared": "The slices are shifted along their rows.",
    "uneven_spacing": "The slices are not evenly spaced.",
    "missing_slices": "There are gaps between the slices.",
    "repeated_positions": "Several slices lie at one position.",
    "mixed_orientation": "The slices are not parallel.",
    "mixed_size": "The slices differ in Rows or Columns.",
    "mixed_pixel_spacing": "The slices differ in PixelSpacing.",
    "mixed_patient": "The instances of the series differ in PatientID.",
    "no_positions": "Slices without ImagePositionPatient or ImageOrientationPatient: their order is by InstanceNumber.",
    "colour_skipped": "Colour images are not in the training array.",
    "array_failed": "The training array could not be made within the limits.",
    "array_values_invalid": "Values that are no finite numbers were replaced in the training array.",
}
"""What was noticed and did not prevent the work."""
