"""Compiled blocks: what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny

import zo2ext
from zo2ext.errors import UserError
from zo2ext.model.compile import is_compiled


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"triton.cudagraphs": True}},
    ],
)
def test_cuda_graphs_are_refused(options: dict[str, Any]) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=r"CUDA graphs.*max-autotune-no-cudagraphs"):
        zo2ext.compile_blocks(model, **options)
    assert not is_compiled(model)
