import highdicom
import numpy as np
import pytest
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from PIL import Image
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from cli.pictures import COLOURS, GAP, SCALE, TILE, Mismatch, overlay, side_by_side
from shared.phantom import write_ct_series

N_SLICES, SIZE = 5, 64


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return sorted(write_ct_series(tmp_path_factory.mktemp("ct"), seed=2, slices=N_SLICES, size=SIZE).iterdir())


def write_seg(path, slices, kind):
    """A segmentation with one square label in the upper left of the middle slice alone; empty frames are left out."""
    algorithm = AlgorithmIdentificationSequence("square", codes.cid7162.ArtificialIntelligence, "1")
    description = SegmentDescription(
        segment_number=1,
        segment_label="square",
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Bone,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    mask = np.zeros((N_SLICES, SIZE, SIZE), np.uint8)
    mask[N_SLICES // 2, 8:24, 8:24] = 1
    seg = highdicom.seg.Segmentation(
        source_images=[dcmread(file) for file in slices],
        pixel_array=mask,
        segmentation_type=kind,
        segment_descriptions=[description],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="radqueue",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=True,
    )
    seg.save_as(path)
    return path


@pytest.mark.parametrize("kind", [SegmentationTypeValues.BINARY, SegmentationTypeValues.LABELMAP])
def test_labels_are_drawn_where_they_lie(slices, tmp_path, kind):
    """The label's colour is on its own slice and place alone, though its frame is not the first, in any file order."""
    seg = write_seg(tmp_path / "seg.dcm", slices, kind)
    picture = np.asarray(Image.open(overlay(slices[::-1], seg, tmp_path / "out" / "o.png", n_columns=N_SLICES)))
    coloured = np.all(picture[: 2 * TILE] == COLOURS[0], axis=2)
    rows, columns = np.nonzero(coloured)

    assert picture.shape[1] == N_SLICES * TILE
    assert len(rows) > 50
    scale = TILE / SIZE
    assert (TILE + 7 * scale <= rows).all()
    assert (rows <= TILE + 25 * scale).all()
    assert (2 * TILE + 7 * scale <= columns).all()
    assert (columns <= 2 * TILE + 25 * scale).all()


def test_a_segmentation_of_other_images_is_refused(slices, tmp_path):
    """A label is never drawn over a slice that it does not lie on."""
    seg = write_seg(tmp_path / "seg.dcm", slices, SegmentationTypeValues.BINARY)
    other = sorted(write_ct_series(tmp_path / "other", seed=9, slices=3, size=SIZE).iterdir())

    with pytest.raises(Mismatch):
        overlay(other, seg, tmp_path / "o.png")


def test_real_images_stand_left_of_generated_ones(tmp_path):
    """Real slices are drawn as small as the generated ones, and each side shows its own grey."""
    for name, shape, value in (("real", (3, 64, 64), 0.5), ("generated", (16, 32, 32), -0.5)):
        np.save(tmp_path / f"{name}.npy", np.full(shape, value, np.float32))
    out = side_by_side([tmp_path / "real.npy"], tmp_path / "generated.npy", tmp_path / "out" / "grid.png")
    picture = np.asarray(Image.open(out))
    width, height = 8 * 32 * SCALE, 2 * 32 * SCALE

    assert picture.shape[1] == 2 * width + GAP
    assert (picture[:height, :width] == 191).all()
    assert (picture[:height, width + GAP :] == 64).all()
