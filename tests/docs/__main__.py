"""Write the parts of the docs that are made from the code: `make docs`."""

from tests.docs.blocks import files

for path, text in files().items():
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        print(path)  # noqa: T201 - a command's output
