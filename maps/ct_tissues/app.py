"""A MONAI application that labels air, soft tissue and bone in a CT series and writes a DICOM segmentation.

It is built from the operators of the MONAI Deploy App SDK; only the one that runs the network is its own. It shows how
an application for radqueue is made, and is not for clinical use.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, ConditionType, Fragment, Image, Model, OperatorSpec
from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.dicom_utils import ModelInfo
from monai.deploy.operators.inference_operator import InferenceOperator
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

VERSION = "1.0.0"
SERIES_DESCRIPTION = "CT tissues - Not for clinical use"
PIXELS_PER_BATCH = 512 * 512
"""One large slice at a time: its feature maps stay near the processor, and memory does not grow with the series."""

# Localizers are CT images of another geometry than the slices that they announce.
SELECTION_RULES = """
{
    "selections": [
        {
            "name": "axial CT",
            "conditions": {
                "Modality": "(?i)^CT$",
                "ImageType": ["PRIMARY", "!LOCALIZER"],
                "PhotometricInterpretation": "MONOCHROME2"
            }
        }
    ]
}
"""


class StudyLoaderOperator(DICOMDataLoaderOperator):
    """The SDK's loader, which also takes a series whose number is empty, as PS3.3 C.7.3.1 allows.

    The SDK's own parses the number without looking, and drops the whole series when that fails.
    """

    def populate_series_attributes(self, series: DICOMSeries, sop_instance: Dataset) -> None:
        """Read what the SDK knows of a series."""
        if "SeriesNumber" in sop_instance and sop_instance.SeriesNumber is None:
            del sop_instance.SeriesNumber
        super().populate_series_attributes(series, sop_instance)


class TissueInferenceOperator(InferenceOperator):
    """Label each voxel of a CT volume, slice by slice, at the resolution of the source.

    Named input:
        image: `Image` of `(Z, Y, X)`, Hounsfield units.

    Named output:
        seg_image: `Image` of `(Z, Y, X) uint8`: 1 air, 2 soft tissue, 3 bone, with the metadata of the input.
    """

    def __init__(self, fragment: Fragment, *args: Any, model: Model, **kwargs: Any) -> None:
        """Take the SDK's model; it is loaded at its first use and may be shared between applications."""
        self._model = model
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports."""
        spec.input("image")
        spec.output("seg_image").condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:  # noqa: ARG002 - the SDK's signature
        """Receive a volume, emit its label map."""
        image = op_input.receive("image")
        labels = self.post_process(self.predict(self.pre_process(image)))
        op_output.emit(Image(labels, image.metadata()), "seg_image")

    def pre_process(self, data: Image, *_: Any, **__: Any) -> npt.NDArray[Any]:
        """Give the voxels `(Z, Y, X)`.

        Raises:
            ValueError: the series is not a stack of grey slices, such as one of a single slice in colour.
        """
        hu: npt.NDArray[Any] = data.asnumpy()
        if hu.ndim != 3:  # noqa: PLR2004
            raise ValueError(f"expected a volume of three axes, got {hu.ndim}")
        return hu

    def predict(self, data: npt.NDArray[Any], *_: Any, **__: Any) -> npt.NDArray[np.uint8]:
        """Run the network on `(Z, Y, X)` Hounsfield units; gives the index of the highest score per voxel."""
        network = self._model.predictor
        device = next(network.parameters()).device
        batch = max(1, PIXELS_PER_BATCH // (data.shape[1] * data.shape[2]))
        best = np.empty(data.shape, np.uint8)
        with torch.inference_mode():
            for start in range(0, len(data), batch):
                hu = torch.from_numpy(data[start : start + batch].astype(np.float32)).unsqueeze(1).to(device)
                best[start : start + batch] = network(hu).argmax(1).to(torch.uint8).cpu().numpy()
        return best

    def post_process(self, data: npt.NDArray[np.uint8], *_: Any, **__: Any) -> npt.NDArray[np.uint8]:
        """Turn the network's classes, from 0, into segment numbers, from 1."""
        return data + np.uint8(1)


class CTTissuesApp(Application):
    """Load a study, select its CT series, make a volume of it, label it, write the labels as a DICOM segmentation."""

    def __init__(self, argv: list[str] | None = None, **kwargs: Any) -> None:
        """Take the command line: None for that of the process, an empty list to go by the environment alone."""
        # The SDK would take an empty list for a missing one, and parse the arguments of whatever process it is in.
        super().__init__([sys.executable, type(self).__name__] if argv == [] else argv, **kwargs)

    def compose(self) -> None:
        """Make the operators and connect them.

        Raises:
            FileNotFoundError: there is no model where `--model` or HOLOSCAN_MODEL_PATH points.
        """
        context: AppContext = Application.init_app_context(self.argv)
        if "log_level" not in context.args:
            _keep_attributes_out_of_the_log()
        if not context.models:
            raise FileNotFoundError(f"no model in {context.model_path}")

        loader = StudyLoaderOperator(
            self, CountCondition(self, 1), input_folder=Path(context.input_path), name="loader"
        )
        selector = DICOMSeriesSelectorOperator(self, rules=SELECTION_RULES, name="selector")
        to_volume = DICOMSeriesToVolumeOperator(self, name="to_volume")
        inference = TissueInferenceOperator(self, model=context.models.get(), name="inference")
        writer = DICOMSegmentationWriterOperator(
            self,
            segment_descriptions=_segment_descriptions(),
            custom_tags={"SeriesDescription": SERIES_DESCRIPTION},
            model_info=ModelInfo("radqueue", "ct_tissues", VERSION, ""),
            output_folder=Path(context.output_path),
            name="writer",
        )
        selected = {("study_selected_series_list", "study_selected_series_list")}
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, to_volume, selected)
        self.add_flow(to_volume, inference, {("image", "image")})
        self.add_flow(selector, writer, selected)
        self.add_flow(inference, writer, {("seg_image", "seg_image")})


def _segment_descriptions() -> list[SegmentDescription]:
    """Segments 1, 2 and 3, with codes of DICOM CID 7150 (categories) and CID 7166 (tissues); air is in neither."""
    tissues = (
        ("Air", codes.SCT.Substance, codes.SCT.Air),
        ("Soft tissue", codes.SCT.Tissue, codes.SCT.SoftTissue),
        ("Bone", codes.SCT.Tissue, codes.SCT.BoneTissue),
    )
    return [
        SegmentDescription(
            segment_label=label,
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_name="radqueue ct_tissues",
            algorithm_family=codes.DCM.ArtificialIntelligence,
            algorithm_version=VERSION,
        )
        for label, category, kind in tissues
    ]


def _keep_attributes_out_of_the_log() -> None:
    """Silence what would echo a study's own text: the SDK's progress messages, and pydicom about malformed values."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="pydicom")
    warnings.filterwarnings("ignore", module="highdicom")
