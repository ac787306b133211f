"""Values that are planted into data sets, and looked for in what comes of them."""

from pydicom.datadict import dictionary_VR

from services.ingest.deidentification import _profile

NO_TEXT = {"SQ", "UI", "AT", "FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"}


def sentinel(number, vr):
    """Return a value of the VR in which the number can be found again."""
    day = f"{1801 + number % 98}{1 + number % 12:02}{1 + number % 28:02}"
    values: dict[str, str | bytes] = {
        "DA": day,
        "DT": f"{day}111111.{number:06}",
        "TM": f"111111.{number:06}",
        "AS": f"{number % 1000:03}W",
    }
    values |= dict.fromkeys(("DS", "IS"), f"77{number:06}")
    values |= dict.fromkeys(("OB", "OW", "UN", "OF", "OD", "OL", "OV"), f"LEAK{number:012}".encode())
    return values.get(vr, f"LEAK{number:06}")


def planted(into, numbers):
    """Plant a sentinel in every text and date of the profile's table, in private blocks and in unknown elements."""
    found = []
    for tag, row in _profile().items():
        if not row["keyword"] or "x" in tag or tag.startswith(("0000", "0002", "0004")):
            continue
        vr = dictionary_VR(int(tag, 16))[:2]
        if vr in NO_TEXT or row["keyword"] in into:
            continue
        value = sentinel(next(numbers), vr)
        into.add_new(int(tag, 16), vr, value)
        if vr != "TM":  # which stays where dates are shifted, by whole days
            found.append(value)
    block = into.private_block(0x0029, "SOMEBODY", create=True)
    for offset, vr in enumerate(("LO", "SH", "PN", "UT", "ST", "LT", "UC", "UR", "CS", "AE", "OB", "UN", "DT")):
        value = sentinel(next(numbers), vr)
        block.add_new(offset, vr, value)
        found.append(value)
    for number, vr in ((0x00080FFF, "LO"), (0x00180FFF, "UN"), (0x60000022, "LO"), (0x60004000, "LT")):
        value = sentinel(next(numbers), vr)
        into.add_new(number, vr, value)
        found.append(value)
    return found
