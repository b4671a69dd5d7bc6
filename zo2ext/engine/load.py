"""Load a model straight from its files into an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zo2ext.checkpoints.file_tensors import tensors_in_files
from zo2ext.checkpoints.folders import check_folder
from zo2ext.checkpoints.pretrained import as_user_errors, transformers_bars
from zo2ext.checkpoints.read import Conversion, concrete_class, read_hollow, weight_files
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.host_weights import Sources
from zo2ext.model.quantized import is_wrapper
from zo2ext.parallel.parallel import Parallel, SingleProcess
from zo2ext.streaming.devices.select import make_device

logger = logging.getLogger(__name__)


def load(
    path_or_name: str | Path,
    config: ZOConfig | None = None,
    *,
    model_class: Any = None,
    train: bool = True,
    parallel: Parallel | None = None,
) -> tuple[Any, ZOEngine]:
    """Load a checkpoint and offload it, with little more host memory than its store needs.

    The model, its losses and what it saves are the same, bit for bit, as with
    ``model_class.from_pretrained`` and `offload`. With ``store="disk"`` the files are read in place
    and never written, so host memory is bounded by ``host_memory``, not by the model.

    Args:
        path_or_name: A folder or a name on the hub, with weights as safetensors.
        config: Settings of the run; the defaults if None.
        model_class: An auto class or a model's own class; ``AutoModelForCausalLM`` if None.
        train: As for `offload`.
        parallel: As for `offload`.

    Returns:
        The model, in eval mode and in the dtype that it was saved in, and its engine.

    Raises:
        UserError: There is no such checkpoint, its files are damaged, or weights are missing or
            have other shapes than its config; the message names them.
        OutOfDeviceMemory: The slots do not fit the device.
        RankFailure: Another rank did not join, or has another run, model or build.

    Example:
        >>> model, zo = zo2ext.load("facebook/opt-13b", zo2ext.ZOConfig(lr=1e-7, device="cuda"))
        >>> with zo:
        ...     loss = zo.step(lambda: model(**batch).loss)
    """
    from transformers import AutoModelForCausalLM

    model_class, config = model_class or AutoModelForCausalLM, config or ZOConfig()
    with (parallel or SingleProcess()).reporting_errors():
        return _load(str(path_or_name), config, model_class, train=train, parallel=parallel)


def _load(
    source: str, config: ZOConfig, model_class: Any, *, train: bool, parallel: Parallel | None
) -> tuple[Any, ZOEngine]:
    from transformers import AutoConfig

    if Path(source).is_dir():
        check_folder(Path(source))
    with as_user_errors(f"cannot load model {source!r}"):
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if (quantized := getattr(settings, "quantization_config", None)) is not None:
        logger.warning(
            "%s is quantized (%s): transformers loads all of it before it is offloaded; quantized "
            "weights are frozen, other weights that are not frozen are trained",
            source,
            quantized["quant_method"] if isinstance(quantized, dict) else quantized.quant_method,
        )
        with as_user_errors(f"cannot load model {source!r}"):
            model = model_class.from_pretrained(source, dtype="auto", trust_remote_code=False)
        for parameter in model.parameters():
            if is_wrapper(parameter):
                parameter.requires_grad_(False)  # bitsandbytes' are frozen already
        return model, _engine(model, config, None, train=train, parallel=parallel)
    with as_user_errors(f"cannot load model {source!r}"), transformers_bars(False):
        files = tensors_in_files(weight_files(source))
        own_class = concrete_class(model_class, settings)
        hollow = read_hollow(own_class, settings, files)
    hollow.check(source)
    with as_user_errors(f"cannot load model {source!r}"), transformers_bars(False):
        model = hollow.build(own_class, settings, source)
    sources = {
        id(p): hollow.sources[name]
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in hollow.sources
    }
    try:
        return model, _engine(model, config, sources, train=train, parallel=parallel)
    finally:
        Conversion.forget()


def _engine(
    model: Any,
    config: ZOConfig,
    sources: Sources | None,
    *,
    train: bool,
    parallel: Parallel | None,
) -> ZOEngine:
    device = make_device((parallel or SingleProcess()).device(config.device))
    return ZOEngine(model, config, device, train=train, sources=sources, parallel=parallel)
