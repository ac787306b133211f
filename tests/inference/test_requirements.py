"""Requirements compared as pip compares them."""

import pytest

from services.inference.package.requirements import Compared, compare

INSTALLED = {"numpy": "2.4.1", "monai-deploy-app-sdk": "4.0.0", "torch": "2.13.0+cpu", "beta": "2.0b1"}
ENVIRONMENT = {"python_version": "3.11", "sys_platform": "linux"}


@pytest.mark.parametrize(
    "line",
    [
        "numpy",
        "numpy>=2,<3  # a comment",
        "NumPy ~= 2.4",
        "numpy!=2.4.0 ; python_version >= '3.9'",
        "monai_deploy.app-sdk==4.*",
        "torch==2.13.0",
        "torch[extra]>=2.13 --hash=sha256:00",
        "beta>=2.0a1",
        "numpy \\\n  >=2",
    ],
)
def test_a_requirement_that_is_met(line):
    """All operators, spellings of a name, local versions and pre-releases count as they do for pip."""
    found = compare(line, INSTALLED, ENVIRONMENT)

    assert (len(found.met), found.missing, found.differing, found.unread) == (1, [], [], [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("numpy<2", Compared(differing=["numpy<2 (there is 2.4.1)"])),
        ("numpy~=2.5", Compared(differing=["numpy~=2.5 (there is 2.4.1)"])),
        ("numpy!=2.4.1", Compared(differing=["numpy!=2.4.1 (there is 2.4.1)"])),
        ("absent", Compared(missing=["absent"])),
        ("absent>=1; sys_platform == 'linux'", Compared(missing=['absent>=1; sys_platform == "linux"'])),
        ("absent; sys_platform == 'win32'", Compared()),
        ("-r other.txt\n--extra-index-url https://host/", Compared(unread=["-r other.txt"])),
        ("./local.whl", Compared(unread=["./local.whl"])),
        ("\n# only a comment\n", Compared()),
    ],
)
def test_a_requirement_that_is_not_met_not_meant_or_not_read(line, expected):
    """What is told apart: another version, no version, another platform's, and what only pip can read."""
    found = compare(line, INSTALLED, ENVIRONMENT)

    assert (found.met, found.missing, found.differing) == (expected.met, expected.missing, expected.differing)
    assert found.unread[:1] == expected.unread
