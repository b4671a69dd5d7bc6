"""Load a model straight from its files into an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zo2ext.checkpoints.file_tensors import open_shards
from zo2ext.checkpoints.pretrained import failing_as
from zo2ext.checkpoints.read import Conversion, concrete_class, plan_reading, weight_files
from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.model.quantized import is_wrapper
from zo2ext.parallel.parallel import Parallel, own_device, reporting_errors
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
    """Load a checkpoint for training, with little more memory than its store takes.

    The model, its losses and what it saves are those of ``model_class.from_pretrained`` and
    `offload`, bit for bit. With ``store="disk"`` the files are read where they are, and never
    written: memory is bounded by ``host_memory``, not by the model.

    Args:
        path_or_name: A folder, or a name on the hub, with weights as safetensors.
        config: Of the run; the defaults when None.
        model_class: An auto class or a model's own; None takes ``AutoModelForCausalLM``.
        train: As for `offload`.
        parallel: As for `offload`.

    Returns:
        The model, in eval mode and in the dtype that it is saved in, and its engine.

    Raises:
        ValueError: There is no such checkpoint, its files are damaged, or weights are missing or
            have other shapes than its config says; they are named.
    """
    from transformers import AutoModelForCausalLM

    model_class, config = model_class or AutoModelForCausalLM, config or ZOConfig()
    with reporting_errors(parallel):
        return _load(str(path_or_name), config, model_class, train=train, parallel=parallel)


def _load(
    source: str, config: ZOConfig, model_class: Any, *, train: bool, parallel: Parallel | None
) -> tuple[Any, ZOEngine]:
    from transformers import AutoConfig

    with failing_as(f"cannot load model {source!r}"):
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if (quantised := getattr(settings, "quantization_config", None)) is not None:
        logger.warning(
            "%s is quantised (%s): transformers loads it whole before it is moved; weights in few "
            "bits stay as they are, what else is not frozen is trained",
            source,
            quantised["quant_method"] if isinstance(quantised, dict) else quantised.quant_method,
        )
        with failing_as(f"cannot load model {source!r}"):
            model = model_class.from_pretrained(source, dtype="auto", trust_remote_code=False)
        for parameter in model.parameters():
            if is_wrapper(parameter):
                parameter.requires_grad_(False)  # bitsandbytes' are frozen already
        device = make_device(own_device(config.device, parallel))
        return model, ZOEngine(model, config, device, train=train, parallel=parallel)
    with failing_as(f"cannot load model {source!r}"):
        files = open_shards(weight_files(source))
        own_class = concrete_class(model_class, settings)
        plan = plan_reading(own_class, settings, files)
    plan.check(source)
    with failing_as(f"cannot load model {source!r}"):
        model = plan.build(own_class, settings, source)
    sources = {
        id(p): plan.sources[name]
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in plan.sources
    }
    try:
        device = make_device(own_device(config.device, parallel))
        return model, ZOEngine(
            model, config, device, train=train, sources=sources, parallel=parallel
        )
    finally:
        Conversion.forget()
