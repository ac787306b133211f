import hashlib

import pytest
import torch
from torch import Tensor, nn

from services.trainer.evaluation.features import INCEPTION, embed, load_extractor
from services.trainer.evaluation.frechet import calculate_fid
from shared.errors import Unprocessable

# The published Inception is a TorchScript file, whatever torch would like best.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SIZE = 24
CPU = torch.device("cpu")


class Means(nn.Module):
    """The mean of each cell of a 4x4 grid, of bytes, per channel: (N, 3, SIZE, SIZE) uint8 to (N, 48)."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 24, 24)
        return nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


class LikeInception(nn.Module):
    """What the published file looks like from outside: 2048 features where they are asked for, else classes."""

    def __init__(self, d: int = 2048) -> None:
        super().__init__()
        self.d = d

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - its signature
        features = images.float().mean(dim=(1, 2, 3))[:, None].repeat(1, self.d)
        return features if return_features else features[:, :1008]


def scripted(path, network):
    torch.jit.script(network.eval()).save(path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def images(n: int, seed: int = 0, size: int = 32) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_torchscript_extractor_sees_bytes_in_one_fixed_window(tmp_path):
    """Black is 0 and white 255 whatever else an image shows, and the features come back in the images' order."""
    path, sha256 = scripted(tmp_path / "means.pt", Means())
    space = load_extractor(path, sha256, size=SIZE, device=CPU)
    levels = torch.tensor([-1, 1, 0, -3]).view(4, 1, 1, 1).expand(4, 1, 32, 32)
    features = space.extract(torch.cat((levels, images(60))))

    assert (space.name, space.metric) == (f"means@{sha256[:12]}", "FD")
    assert features.shape == (64, 48)
    assert features[:4].unique(dim=1).flatten().tolist() == [0, 255, 128, 0]


def test_images_are_resized_with_antialiasing(tmp_path):
    """Lines finer than the extractor's pixels become their mean; without antialiasing they would be missed."""
    path, sha256 = scripted(tmp_path / "means.pt", Means())
    lines = (torch.arange(96) % 4 == 0).float()[:, None].expand(1, 1, 96, 96) * 2 - 1
    features = load_extractor(path, sha256, size=SIZE, device=CPU).extract(lines)

    assert features.sub(255 / 4).abs().max() < 6


def test_exported_extractor_gives_what_the_scripted_one_gives(tmp_path):
    """A torch.export file is the same space by another road, with any number of images."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    exported = torch.export.export(Means(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "means.pt2")
    sha256 = hashlib.sha256((tmp_path / "means.pt2").read_bytes()).hexdigest()
    scripted_space = load_extractor(*scripted(tmp_path / "means.pt", Means()), size=SIZE, device=CPU)
    exported_space = load_extractor(tmp_path / "means.pt2", sha256, size=SIZE, device=CPU)

    assert torch.equal(exported_space.extract(images(5)), scripted_space.extract(images(5)))


def test_only_inception_makes_a_fid(tmp_path):
    """The distance is called FID in the features of Inception's file alone, and warns that n is small for 2048."""
    inception = load_extractor(*scripted(tmp_path / INCEPTION, LikeInception()), size=SIZE, device=CPU)
    other = load_extractor(*scripted(tmp_path / "means.pt", Means()), size=SIZE, device=CPU)
    found = [calculate_fid(images(40), images(40, 1), images(40, 2), space=space) for space in (inception, other)]

    assert [(one.metric, one.space.partition("@")[0], one.d) for one in found] == [
        ("FID", "inception-2015-12-05/d2048", 2048),
        ("FD", "means", 48),
    ]
    assert [one.warnings for one in found] == [("few_images",), ("few_images",)]
    assert calculate_fid(images(40), images(40, 1), images(40, 2)).metric == "FD"


def test_what_is_not_the_named_file_is_refused(tmp_path):
    """Another hash, a file that is no network, and an Inception of other features each have a reason."""
    path, _ = scripted(tmp_path / "means.pt", Means())
    with pytest.raises(Unprocessable, match="extractor_changed"):
        load_extractor(path, "0" * 64, size=SIZE, device=CPU)

    path.write_bytes(b"no network")
    with pytest.raises(Unprocessable, match="invalid_extractor"):
        load_extractor(path, hashlib.sha256(b"no network").hexdigest(), size=SIZE, device=CPU)

    space = load_extractor(*scripted(tmp_path / INCEPTION, LikeInception(d=2047)), size=SIZE, device=CPU)
    with pytest.raises(Unprocessable, match="invalid_extractor"):
        space.extract(images(2))


def test_n_is_equal_on_both_sides(tmp_path):
    """However many images there are, sets of one n are compared, in every draw."""
    space = load_extractor(*scripted(tmp_path / "means.pt", Means()), size=SIZE, device=CPU)
    embedded = embed(space, images(9), images(40, 1), images(17, 2))

    assert embedded.n == 9
    assert {tuple(len(part) for part in drawn) for drawn in embedded.draws(0)} == {(9, 9, 9)}
