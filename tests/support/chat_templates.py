"""Published chat templates, and tokenizers that hold the special tokens of each.

The Jinja files are read from installed packages, which are installed without their dependencies and
never imported: `make venv` installs the versions named in the Makefile.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from support.tiny_policy import TRAINING_TEXT


@dataclass(frozen=True)
class Published:
    """A published template, with what its model's tokenizer has.

    Attributes:
        package: name of the Python package that ships it.
        file: its path within the package's files.
        end: the text of the token that ends a turn of the assistant, from the model's card.
        eos: the tokenizer's eos_token.
        special: further special tokens, which the template writes.
        named: further end tokens of the model's generation config.
    """

    package: str
    file: str
    end: str
    eos: str
    special: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A short name for test ids."""
        return self.file.rpartition("/")[2].removesuffix(".jinja")

    def text(self) -> str:
        """The Jinja text; skips the test if the package is not installed."""
        try:
            found = importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{self.package} is not installed (make venv)")
        return str(found.locate_file(self.file).read_text(encoding="utf-8"))  # type: ignore[attr-defined]


_TRL = "trl", "trl/chat_templates/"
_CHATML = ("<|im_start|>",)
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>")
_GEMMA = ("<start_of_turn>",)
_DEEPSEEK = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
_COHERE = (
    *("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
_DEEPSEEK_EOS = "<\uff5cend▁of▁sentence\uff5c>"
_PHI = ("<|user|>", "<|assistant|>", "<|system|>")


def _trl(name: str, end: str, eos: str | None = None, *special: str, named: Any = ()) -> Published:
    return Published(_TRL[0], f"{_TRL[1]}{name}.jinja", end, eos or end, special, tuple(named))


PUBLISHED = (
    _trl("llama3", "<|eot_id|>", "<|end_of_text|>", *_LLAMA),
    _trl("llama3_1", "<|eot_id|>", "<|end_of_text|>", *_LLAMA, "<|python_tag|>"),
    _trl("llama3_2", "<|eot_id|>", "<|end_of_text|>", *_LLAMA),
    _trl("gemma", "<end_of_turn>", "<eos>", *_GEMMA),
    _trl("gemma3", "<end_of_turn>", "<eos>", *_GEMMA),
    _trl("gemma4", "<turn|>", "<eos>", "<|turn>"),
    _trl("phi3", "<|end|>", "<|endoftext|>", *_PHI),
    _trl("phi3_5", "<|end|>", "<|endoftext|>", *_PHI),
    _trl("qwen2_5", "<|im_end|>", None, *_CHATML),
    _trl("qwen3", "<|im_end|>", None, *_CHATML),
    _trl("qwen3_instruct_2507", "<|im_end|>", None, *_CHATML),
    _trl("qwen3_5_think", "<|im_end|>", None, *_CHATML),
    _trl("lfm2", "<|im_end|>", None, *_CHATML),
    _trl("nemotron_3_nano", "<|im_end|>", None, *_CHATML),
    _trl("deepseek_r1_distill", _DEEPSEEK_EOS, None, *_DEEPSEEK),
    _trl("deepseekv3", _DEEPSEEK_EOS, None, *_DEEPSEEK),
    _trl("cohere", "<|END_OF_TURN_TOKEN|>", None, *_COHERE),
    _trl("cohere2", "<|END_OF_TURN_TOKEN|>", None, *_COHERE),
    _trl(
        *("glm4moe", "<|user|>", "<|endoftext|>", "[gMASK]", "<sop>", "<|assistant|>"),
        *("<|system|>", "<|observation|>"),
        named=("<|user|>", "<|observation|>"),
    ),
    _trl(
        *("gptoss", "<|return|>", None, "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
        "<|call|>",
        named=("<|call|>",),
    ),
    _trl("smolvlm", "<end_of_utterance>"),
)
NAMES = [published.name for published in PUBLISHED]


def published(name: str) -> Published:
    """The published template of a name."""
    return PUBLISHED[NAMES.index(name)]


@functools.cache
def chat_tokenizer(name: str) -> Any:
    """A byte-level BPE tokenizer with the special tokens and the template of `name`."""
    found = published(name)
    tokenizer = byte_level_tokenizer((found.end, *found.special, *found.named), eos=found.eos)
    tokenizer.chat_template = found.text()
    return tokenizer


def end_ids(name: str) -> frozenset[int]:
    """Ids of the end tokens that the model's generation config names."""
    tokenizer = chat_tokenizer(name)
    found = published(name)
    return frozenset(tokenizer.convert_tokens_to_ids(list(found.named)))


def byte_level_tokenizer(special: Iterable[str], *, eos: str, bos: str = "<s>") -> Any:
    """A byte-level BPE as GPT-2, Llama-3 and Qwen have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Whitespace merges across line ends, as in the tokenizers of Llama-3 and Qwen.
    tokenizer.train_from_iterator([*TRAINING_TEXT, "a\n\nb\n\n\nc \n\n d"] * 3, trainer)
    return _fast(tokenizer, special, eos, bos)


def metaspace_tokenizer(special: Iterable[str], *, eos: str, bos: str = "<s>") -> Any:
    """A BPE with byte fallback that writes a space before each text, as Llama-2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # As SentencePiece trains: no merge spans two words. The tokenizer itself does not split.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator([*TRAINING_TEXT] * 3, trainer)
    tokenizer.pre_tokenizer = None
    return _fast(tokenizer, special, eos, bos)


def _fast(tokenizer: Any, special: Iterable[str], eos: str, bos: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    more = [token for token in dict.fromkeys(special) if token not in (eos, bos)]
    fast.add_special_tokens({"additional_special_tokens": more})
    return fast
