"""Functions that make tokenizers and models with a few thousand weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


TRAINING_TEXT = (
    "What is 2 + 3? The answer is 5.",
    "Write the word cat twice: cat cat",
    "Janet has 16 eggs and sells 9 of them. How many are left? 16 - 9 = 7",
    "Say hello to the person who asks, and be brief. Hello!",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
)


def train_tokenizer(folder: Path, *, eos: bool = True, chat_template: bool = True) -> Path:
    """Train a byte-level BPE of 400 entries and save it as a transformers tokenizer.

    <pad> is 0, <bos> is 1, <eos> is 2; encoding with special tokens puts <bos> first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>" if eos else None,
        pad_token="<pad>",
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def make_tiny_model(folder: Path, tokenizer_dir: Path) -> Path:
    """Save a two-layer Qwen3 with seeded random weights, and the tokenizer, in one folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return save_tiny(folder, tokenizer_dir, Qwen3Config, Qwen3ForCausalLM, head_dim=8)


def save_tiny(folder: Path, tokenizer_dir: Path, config: Any, kind: Any, **settings: Any) -> Path:
    """Save a two-layer model with seeded random weights and a tied head, and the tokenizer.

    Args:
        folder: of both.
        tokenizer_dir: folder of the tokenizer.
        config: class of the model's configuration, with the settings of a Llama.
        kind: class of the model.
        settings: further settings of the configuration.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    made = config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(made)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_word_model(folder: Path, words: Iterable[str], **changes: Any) -> Path:
    """Save a Qwen3 with seeded random weights and a tokenizer with one token for each word.

    <pad> is 0, <eos> is 1, <unk> is 2; the words follow in the given order.

    Args:
        folder: where the model and the tokenizer are saved.
        words: the vocabulary; texts are split at whitespace.
        changes: settings of the configuration, such as num_hidden_layers.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {text: number for number, text in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }
    config = Qwen3Config(
        vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=1, pad_token_id=0, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def stored_model(folder: Path, source: Path, dtype: Any, **changes: Any) -> Path:
    """A model with bfloat16 values, in files of a torch data type; `changes` of `source`'s
    configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
