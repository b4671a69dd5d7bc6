"""Import the compiled extension, or raise an error that names the remedy."""

from pathlib import Path

from zo2ext.errors import ExtensionError

# Without isolation, so that it is built against the torch that is installed.
INSTALL = "pip install --no-build-isolation -e ."

try:
    from zo2ext.ops import _C as _C
except ImportError as error:
    folder = Path(__file__).parent
    if any(folder.glob("_C*.so")):
        raise ExtensionError(
            f"zo2ext's compiled extension in {folder} cannot be loaded ({error}); it was built "
            f"for another release of torch or Python, so build zo2ext again: run `{INSTALL}` in "
            "the clone"
        ) from error
    raise ExtensionError(
        f"zo2ext's compiled extension is missing in {folder}; if that is the source folder, run "
        f"`{INSTALL}` in the clone, or change to another folder to use an installed zo2ext"
    ) from error
