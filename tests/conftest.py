"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

# Read when torch and transformers are imported.
os.environ["HF_HUB_OFFLINE"] = "1"  # tests load nothing remote
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Waiting threads sleep: on a busy machine, spinning ones make a tiny forward 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Torch looks at it once, when cuBLAS is first used, by whatever test: some ask for determinism.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import packaged
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# What `make quick` leaves out, by the beginning of a path in this folder.
RANKS = ("commands/test_ranks_train.py", "parallel/", "streaming/test_sliced.py")
SLOW = (
    "commands/test_demo.py",
    "commands/test_learning_rate.py",
    "commands/test_train.py",
    "engine/test_parity.py",
    "engine/test_reference.py",
    "integrations/",
    "model/test_factored_models.py",
    "model/test_models.py",
    "model/test_quantized.py",
    "ops/test_cuda.py",
    "ops/test_formats.py",
    "ops/test_noise.py",
    "runs/test_find_lr.py",
    "runs/test_report.py",
    "runs/test_run.py",
    "streaming/test_disk.py",
    "tasks/test_tasks.py",
    "test_benchmarks.py",
    "test_examples.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow or as runs of several processes, by the module that they are in."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        for marker, prefixes in (("ranks", RANKS), ("slow", SLOW)):
            if path.startswith(prefixes):
                item.add_marker(marker)


def why_no_cuda() -> str | None:
    """The reason that GPU tests cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    from zo2ext import ops

    return None if ops.cuda_built() else "no CUDA device: zo2ext was built without CUDA"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that are marked `gpu` where they cannot run."""
    if item.get_closest_marker("gpu") and (reason := why_no_cuda()):
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that kernels run on; a test that takes it runs once on each."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretrained Llama of 174,528 parameters and its tokenizer of whole words."""
    return packaged.write_model(tmp_path_factory.mktemp("packaged") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the model knows: 4,051 tokens to train on and 457 held out."""
    return packaged.write_text(tmp_path_factory.mktemp("packaged") / "text.txt")


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sst2, trec, rte and cb with made-up examples in the tasks' own file formats."""
    return packaged.write_tasks(tmp_path_factory.mktemp("packaged") / "tasks")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data sets and a model of English: only for tests of those themselves.

    It is ZO2EXT_TEST_DATA, or ../shared/data beside the repository.
    """
    path = Path(os.environ.get("ZO2EXT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}: set ZO2EXT_TEST_DATA")
    return path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """torch's generators begin alike in every test, in whatever order tests run."""
    torch.manual_seed(0)
