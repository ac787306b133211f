"""Builds HTML and SVG as a tree, so that every text is escaped by construction."""

from xml.etree.ElementTree import Element, tostring

Child = Element | str | None
Attribute = str | float | None


def el(tag: str, *children: Child, **attributes: Attribute) -> Element:
    """Return an element; `class_` stands for class, `stroke_width` for stroke-width. None is left out."""
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            element.set(name.rstrip("_").replace("_", "-") if name != "viewBox" else name, text)
    for child in children:
        if isinstance(child, str):
            _append_text(element, child)
        elif child is not None:
            element.append(child)
    return element


def document(root: Element) -> bytes:
    """Return the page as UTF-8."""
    return b"<!doctype html>\n" + tostring(root, encoding="unicode", method="html").encode("utf-8", "replace")


def _append_text(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text
