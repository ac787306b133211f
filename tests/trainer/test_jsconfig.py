import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.config import InvalidConfig, TrainingConfig, UnknownParameter
from services.trainer.jsconfig import modify_config, modify_config_file, read_config

SHIPPED = Path("services/trainer/config.js").read_text(encoding="utf-8")
AWKWARD = """/* head: learningRate: 1 */
export default {
  'quoted name': "a \\"b\\" \\u00e9 \\x41",   // steps: 7
  steps: 0x20,   /* between */ rate: -2e-4,
  on: true, off : false, grouped: 1_000,
  text: 'it\\'s',  // no comma after this one
};
// tail
"""
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
VALUES = NUMBERS | st.text() | st.booleans()


def test_shipped_config_is_valid():
    """The config that the service ships names every parameter once, with a value in range."""
    config = TrainingConfig.of(read_config(SHIPPED))

    assert config.image_size == 32
    assert isinstance(config.learning_rate, float)


def test_reads_every_kind_of_literal():
    """Numbers in JavaScript's notations, strings with escapes and booleans are read as what they mean."""
    config = read_config(AWKWARD)

    assert config == {
        "quoted name": 'a "b" é A',
        "steps": 32,
        "rate": -2e-4,
        "on": True,
        "off": False,
        "grouped": 1000,
        "text": "it's",
    }
    assert isinstance(config["steps"], int)


@given(value=VALUES)
def test_value_survives_a_round_trip(value):
    """Whatever literal is written is read back, equal and of the same type."""
    found = read_config(modify_config(AWKWARD, {"rate": value}))["rate"]

    assert found == value
    assert type(found) is type(value)


@given(changes=st.dictionaries(st.sampled_from(["steps", "rate", "on", "text", "quoted name"]), VALUES))
def test_only_the_named_values_change(changes):
    """Undoing an edit gives the file back byte for byte: comments, order and layout were never touched."""
    edited = modify_config(AWKWARD, changes)
    marked = modify_config(edited, dict.fromkeys(changes, 0))

    assert read_config(edited) == read_config(AWKWARD) | changes
    assert marked == modify_config(AWKWARD, dict.fromkeys(changes, 0))


def test_file_is_edited_in_place(tmp_path):
    """A file keeps its comments and its own line ends."""
    path = tmp_path / "config.js"
    path.write_bytes(SHIPPED.replace("\n", "\r\n").encode())
    modify_config_file(path, learningRate=5e-4, steps=7)
    expected = SHIPPED.replace("1e-3,", "0.0005,").replace("steps: 250,", "steps: 7,").replace("\n", "\r\n")

    assert path.read_bytes() == expected.encode()


def test_unknown_parameter_is_named():
    """A change to a parameter that is not there names it, and changes nothing."""
    with pytest.raises(UnknownParameter, match="learningrate"):
        modify_config(SHIPPED, {"learningrate": 1.0, "steps": 3})


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"learningrate": 1.0}, "learningrate"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"steps": 1.5}, "steps: Input should be a valid integer"),
        ({"imageSize": "32"}, "imageSize: Input should be a valid integer"),
        ({"imageSize": 48}, "imageSize: Value error, not a power of two"),
        ({"beta2": True}, "beta2: Input should be a valid number"),
        ({"learningRate": float("nan")}, "learningRate"),
    ],
)
def test_a_refused_edit_names_its_place_and_leaves_the_file(tmp_path, changes, place):
    """What may not be is refused with line and name, and nothing of the edit is written."""
    path = tmp_path / "config.js"
    path.write_text(SHIPPED, encoding="utf-8")
    with pytest.raises(InvalidConfig, match=place) as refused:
        modify_config_file(path, seed=5, **changes)
    lines = [number for number, line in enumerate(SHIPPED.splitlines(), 1) if f" {next(iter(changes))}:" in line]

    assert path.read_text(encoding="utf-8") == SHIPPED
    if "Input" in place:
        assert str(refused.value).startswith(f"line {lines[0]}: ")


def test_a_file_that_is_edited_must_be_a_whole_config(tmp_path):
    """A file that lacks a parameter, or has one that no training knows, is refused by its names."""
    path = tmp_path / "config.js"
    path.write_text(SHIPPED.replace("  seed: 0,", "  sede: 0,"), encoding="utf-8")
    with pytest.raises(InvalidConfig, match=r"seed: missing; line \d+: sede: unknown parameter"):
        modify_config_file(path, steps=5)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("export default { a: 1 + 1 };", "a"),
        ("export default { a: process.env.HOME };", "a"),
        ("export default { a: [1] };", "a"),
        ("export default { a: 1n };", "a"),
        ("export default { a: 1e999 };", "a"),
        ("export default { a: `x` };", "a"),
        ("export default { a: 1, a: 2 };", "a: given twice"),
        ("\nexport default { ...other };", "line 2"),
        ("\nexport default { f() {} };", "line 2"),
        ("\n\nexport default { a: };", "line 3"),
        ("export default { a: '\\ud800' };", "line 1"),
        ("const a = 1;", "export default"),
        ("export default 3;", "export default"),
    ],
)
def test_anything_but_literals_is_refused_with_its_place(text, place):
    """What would have to be run to be known is refused, and the text says where it stands."""
    with pytest.raises(InvalidConfig, match=place):
        read_config(text)


@given(text=st.text(alphabet=string.printable))
def test_any_text_is_read_or_refused(text):
    """No input makes the reader fail in any other way."""
    try:
        read_config("export default {" + text + "};")
    except InvalidConfig:
        return


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1.5}, {"steps": 0}, {"imageSize": 48}, {"imageSize": "32"}, {"learningRate": 2}, {"beta2": True}],
)
def test_values_out_of_range_or_type_are_refused_by_name(changes):
    """A value of the wrong type or out of range is refused with the parameter's name and without the value."""
    with pytest.raises(InvalidConfig, match=next(iter(changes))):
        TrainingConfig.of(read_config(modify_config(SHIPPED, changes)))
