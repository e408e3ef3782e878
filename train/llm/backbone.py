"""The frozen language model: loading, quantizing, and LoRA around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache.errors import CheckpointError, MissingDependencyError, SchemaError, near_miss
from train.config import LlmConfig, LoraConfig

TINY_LLM = "emocache/tiny"
"""Name of the bundled language model."""


def llm_path(config: LlmConfig) -> str:
    """Return the folder or hub name to load, resolving the bundled model's name."""
    if config.path == TINY_LLM:
        return str(Path(__file__).parents[1] / "tiny" / "llm")
    return config.path


def load_tokenizer(config: LlmConfig) -> Any:
    """Load a chat model's tokenizer.

    Raises:
        CheckpointError: No such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(llm_path(config), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable("tokenizer of language model", config, error) from None


def load_llm(config: LlmConfig) -> Any:
    """Load a frozen chat model.

    Raises:
        CheckpointError: No such folder, not a causal language model, or damaged weights.
        MissingDependencyError: Quantizing without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    dtype = getattr(torch, config.dtype)
    more: dict[str, Any] = {}
    if config.quantize is not None:
        _check_bitsandbytes()
        four: Any = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
        quantization = four if config.quantize == "4bit" else {"load_in_8bit": True}
        bits: Any = BitsAndBytesConfig
        more = {"quantization_config": bits(**quantization)}
    try:
        return AutoModelForCausalLM.from_pretrained(
            llm_path(config), dtype=dtype, trust_remote_code=False, use_safetensors=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable("language model", config, error) from None


def empty_llm(config: LlmConfig) -> Any:
    """Return the model without weights, on the meta device: shapes only, in no time.

    Raises:
        CheckpointError: No such folder, or not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        found = AutoConfig.from_pretrained(llm_path(config), trust_remote_code=False)
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            return auto.from_config(found, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable("language model", config, error) from None


def _unloadable(what: str, config: LlmConfig, error: Exception) -> CheckpointError:
    first = str(error).strip().splitlines()[0]
    return CheckpointError(
        f"{what} {config.path!r} cannot be loaded: {first[:300]} "
        "Give a folder with config.json, safetensors and a tokenizer: model.llm.path=FOLDER"
    )


def _check_bitsandbytes() -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "model.llm.quantize needs bitsandbytes: pip install bitsandbytes (and a CUDA device), or "
            "set model.llm.quantize=null"
        )


def with_lora(llm: Any, lora: LoraConfig) -> Any:
    """Freeze a language model and wrap it by peft.

    Raises:
        SchemaError: A target that no linear layer's name ends in; lists the candidates.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    names = linear_names(llm)
    for target in lora.targets:
        if target not in names:
            raise SchemaError(
                f"model.lora.targets: this language model has no linear layer '{target}'."
                f"{near_miss(target, names)} Candidates: {', '.join(names)}"
            )
    wrapped = get_peft_model(
        llm,
        PeftConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        # Half-precision models run under autocast, which brings LoRA's float32 weights to the
        # input's precision; peft's own way, the input to float32, takes twice the memory.
        layer.cast_input_dtype_enabled = False
    return wrapped


def linear_names(llm: Any) -> list[str]:
    """Return the last parts of the names of all linear layers but the output's."""
    head = llm.get_output_embeddings()
    # Quantized layers are linear too, and so are the Conv1D of some older models by another name.
    found = [
        name.rpartition(".")[2]
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    return list(dict.fromkeys(found))


def context_length(llm: Any) -> int | None:
    """Return how many positions a model was made for; None if its config does not say."""
    found = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def n_text_layers(llm: Any) -> int:
    """Return the number of a model's decoder layers."""
    return int(llm.config.get_text_config().num_hidden_layers)


def decoder_layers(llm: Any) -> nn.ModuleList:
    """Return the decoder layers, whatever the architecture calls them.

    Raises:
        SchemaError: None found.
    """
    n = n_text_layers(llm)
    for module in llm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return module
    raise SchemaError(
        f"{type(llm).__name__}: no list of {n} decoder layers found, so it can neither be compiled "
        "nor sharded block by block. Set execution.compile=false, or train with --parallel ddp."
    )
