"""A package without its compiled extension, or with a damaged one, reports the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zo2ext

PACKAGE = Path(zo2ext.__file__).parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A source folder in which nothing was built."""
    shutil.copytree(
        PACKAGE, tmp_path / "zo2ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def run(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_command_in_a_clone_reports_what_to_do_in_one_line(clone: Path) -> None:
    done = run(clone, "-m", "zo2ext", "info")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"zo2ext info: error: zo2ext's compiled extension is missing in {clone}/zo2ext/ops; if "
        "that is the source folder, run `pip install --no-build-isolation -e .` in the clone, or "
        "change to another folder to use an installed zo2ext"
    ]


def test_an_import_raises_an_import_error_that_can_be_caught_by_name(clone: Path) -> None:
    source = (
        "import zo2ext\n"
        "try: zo2ext.offload\n"
        "except zo2ext.ExtensionError as error: print(isinstance(error, ImportError), error)\n"
    )
    done = run(clone, "-c", source)
    assert done.stdout.startswith("True zo2ext's compiled extension is missing in ")


def test_a_damaged_extension_is_not_called_missing(clone: Path) -> None:
    built = next(PACKAGE.glob("ops/_C*.so"))
    (clone / "zo2ext" / "ops" / built.name).write_bytes(b"no library")
    done = run(clone, "-c", "import zo2ext.ops")
    assert "ExtensionError: zo2ext's compiled extension in " in done.stderr
    assert "cannot be loaded" in done.stderr
    assert "build zo2ext again" in done.stderr
