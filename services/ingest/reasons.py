"""Every code that ingest gives: why an upload or a message was refused, and what was noticed in what was taken."""

REASONS = {
    # Of the object.
    "bad_dataset_name": "The folder under incoming/ is not a dataset name. Use letters, digits, '_', '.' and '-'.",
    "not_dicom": "Neither a DICOM file nor a zip or a tar. Upload the file that the scanner or the PACS wrote.",
    "too_large": "Reading it takes more than the limits allow. Raise RADQUEUE_MAX_* if the file is legitimate.",
    "deadline": "Reading it took longer than allowed. Raise RADQUEUE_DECODE_DEADLINE_S if the file is legitimate.",
    "decoder_crashed": "A decoder crashed on it. The file is probably damaged; keep it for a bug report.",
    "unreadable": "Its structure cannot be read. Export it again.",
    # Of an archive.
    "zip_damaged": "The archive, or a member of it, is damaged or ends early. Make it again.",
    "zip_encrypted": "The zip, or a member of it, is encrypted. Upload it without a password.",
    "zip_in_zip": "An archive inside an archive is not opened. Upload the inner one.",
    "zip_too_large": "More members or more bytes than the limits allow. Split it, one study per archive.",
    "zip_ratio": "It expands beyond every real image: a decompression bomb. Ask where it came from.",
    "zip_unsupported": "A member is compressed by a method other than deflate, or is sparse. "
    "Make the archive again without.",
    "zip_link": "A member is a link or a device, no file. Put the files themselves into the archive.",
    # Of a DICOM file.
    "truncated": "The file ends before its data set does. Upload it again.",
    "dicomdir": "A DICOMDIR only lists other files. Upload those, or an archive of all.",
    "missing_uid": "StudyInstanceUID, SeriesInstanceUID or SOPInstanceUID is missing. Export it again, with UIDs.",
    "invalid_uid": "One of these UIDs is not made of digits and dots, or is longer than 64. Give it valid UIDs.",
    "missing_sop_class": "No SOPClassUID, and neither the file meta group nor the modality gives it. Add it.",
    "unsupported_transfer_syntax": "This transfer syntax is not read (video, for instance). Export it in another one.",
    "bad_image_header": "Rows, Columns, BitsAllocated and their like are missing or contradictory. Export it again.",
    "missing_pixel_data": "An image without pixels. Export it again, or upload the original.",
    "frame_count": "There are more or fewer frames than NumberOfFrames says. Export it again.",
    "frame_mismatch": "A compressed frame has another size or depth than the header says. Export it uncompressed.",
    "frame_damaged": "A compressed frame cannot be decoded, or has no end. Export it again, uncompressed if possible.",
    "conflicting_duplicate": "Another data set is stored under this SOPInstanceUID. Give the changed one a new UID.",
    "cannot_deidentify": "Its dataset is de-identified, and it has no pixels or cannot be read: reports, documents. "
    "Upload it into a dataset that is not.",
    "burned_in_suspected": "Its dataset is de-identified, and the picture may show who the patient is. "
    "Write a region rule into datasets.yaml, or have BurnedInAnnotation say NO.",
}
"""Why an upload, or a member of an archive, was refused, and what its owner can do."""

DEAD_LETTERS = {
    # Of an upload's notification.
    "object_gone": "The uploaded object was deleted before it was read. Upload it again.",
    "other_bucket": "The notification is about another bucket than RADQUEUE_BUCKET. Correct the setting or the bucket.",
    # Of a series; its instances stay stored, and it settles when the message is sent again or another instance comes.
    "series_gone": "No instance of the series is stored any more. Upload it again, if it was not deleted on purpose.",
    "series_deadline": "Describing the series took longer than RADQUEUE_SERIES_DEADLINE_S. Raise it.",
    "series_cpu_limit": "Describing the series took more processor time than RADQUEUE_SERIES_CPU_S. Raise it.",
    "series_out_of_memory": "Describing the series took more memory than RADQUEUE_DECODE_MEMORY_BYTES. Raise it.",
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
    "charset_unknown": "SpecificCharacterSet names no character set of the standard; texts keep their bytes.",
    "element_repeated": "An element was there more than once; the last one counts.",
    "element_unreadable": "An element's value cannot be converted; its bytes are kept with VR OB.",
    "image_header_completed": "Parts of the image's header were missing: grey, unsigned, all bits in use was assumed.",
    "high_bit_corrected": "HighBit contradicted BitsStored or the values; the values begin at the lowest bit now.",
    "bits_stored_corrected": "The pixel values take more bits than BitsStored said.",
    "excess_pixel_data": "Bytes after the pixel data that the header describes were dropped.",
    "icon_removed": "A compressed icon was removed with the compression of the image.",
    # Of a series.
    "conflicting_instances": "Two workers stored data sets with one SOPInstanceUID at one moment; the older is used.",
    "gantry_tilt": "A tilted gantry sheared the slices against their normal: a stack of them is not an upright volume.",
    "tilt_tag_mismatch": "GantryDetectorTilt says another angle than the positions.",
    "sheared": "The slices are shifted along their rows.",
    "uneven_spacing": "The slices are not evenly spaced.",
    "missing_slices": "There are gaps between the slices.",
    "repeated_positions": "Several slices lie at one position.",
    "several_sets": "Each position has the same number of slices, several: a 4-D series.",
    "mixed_orientation": "The slices are not parallel.",
    "mixed_size": "The slices differ in Rows or Columns.",
    "mixed_pixel_spacing": "The slices differ in PixelSpacing.",
    "localizer": "Localizers (scouts): ImageType says so, or a few slices each in planes that stand upon one another.",
    "mixed_patient": "The instances of the series differ in PatientID.",
    "no_positions": "Slices without ImagePositionPatient or ImageOrientationPatient: their order is by InstanceNumber.",
    "colour_skipped": "Colour images are not in the training array.",
    "localizer_left_out": "Localizers are not in the training array.",
    "smaller_stacks_left_out": "Only the largest stack of a mixed series is in the training array.",
    "blank_left_out": "Slices that show nothing are not in the training array.",
    "burned_in_left_out": "Pictures that may show who the patient is are not in the training array.",
    "array_failed": "The training array could not be made within the limits.",
    "array_values_invalid": "Values that are not finite numbers were replaced in the training array.",
}
"""What was noticed and did not prevent the work."""
