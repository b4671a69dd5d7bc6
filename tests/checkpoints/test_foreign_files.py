"""Files that anybody may have made: read, or refused with the product's own error."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zo2ext.checkpoints.file_tensors import tensors_in_files
from zo2ext.checkpoints.folders import check_index
from zo2ext.errors import UserError, ZO2Error
from zo2ext.journal.records import opening, parse

NUMBERS = st.integers() | st.integers(-3, 30) | st.floats() | st.just(2**64)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U64"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
HEADER = st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=3) | JSON
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def own_error(work: Any, *arguments: Any) -> None:
    with suppress(ZO2Error):  # any other error fails the test
        work(*arguments)


@FEW
@given(header=HEADER)
@example(header={"a": {"dtype": "F32", "shape": [0, 2**64], "data_offsets": [0, 0]}})
@example(header={"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}})
def test_headers_of_safetensors(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    own_error(lambda: [t.tensor() for t in tensors_in_files([path]).values()])


@FEW
@given(content=st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode()))
def test_indexes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    own_error(check_index, path)


@FEW
@given(
    header=st.fixed_dictionaries({}, optional={"config": JSON, "start": JSON, "tensors": JSON}),
    records=st.binary(max_size=200),
)
def test_journals(header: dict[str, Any], records: bytes) -> None:
    own_error(parse, opening(header) + records, Path("journal.zo2"))


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    text = b"[" * 200_000
    (tmp_path / "index.json").write_bytes(text)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match=r"index\.json is not an index"):
        check_index(tmp_path / "index.json")
    with pytest.raises(UserError, match="damaged header"):
        tensors_in_files([tmp_path / "model.safetensors"])
