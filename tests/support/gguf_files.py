"""Writes GGUF files of tiny models, with the package gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_policy import save_tiny


def make_tiny_llama(folder: Path, tokenizer_dir: Path) -> Path:
    """Save a two-layer Llama with seeded random weights and a tied head, and the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_tiny(folder, tokenizer_dir, LlamaConfig, LlamaForCausalLM)


def write_gguf(model_dir: Path, file: Path) -> Path:
    """A GGUF file with the float32 weights, configuration and tokenizer of a tiny Llama.

    Args:
        model_dir: a folder as of `make_tiny_llama`, whose tokenizer is a byte-level BPE.
        file: where to; its folder is created.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model_dir / "config.json").read_text())
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    _add_tokenizer(writer, tokenizer, model_dir)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        own = names.get_name(name, try_suffixes=(".weight",))
        assert own is not None
        kind = own.split(".")[-2].removeprefix("attn_")
        writer.add_tensor(own, _interleaved(tensor, heads[kind]) if kind in heads else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(weight: Any, heads: int) -> Any:
    """Rows in the order of GGUF: llama.cpp rotates neighbours, transformers rotates two halves."""
    half = weight.shape[0] // heads // 2
    rows = weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(weight.shape))


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], model_dir: Path) -> None:
    import gguf

    ids = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template((model_dir / "chat_template.jinja").read_text())
