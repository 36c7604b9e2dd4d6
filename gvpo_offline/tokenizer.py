"""Loads tokenizers, and compares them by fingerprint.

Tokenizers with one fingerprint make the same token ids of the same text.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.files import gguf_refusal, model_files
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.files import read_text
from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.manifest import TokenizerInfo
from gvpo_offline.system_errors import raise_translated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Padding and truncation are per-call settings that the fast tokenizer stores in its own JSON.
_PER_CALL_KEYS = ("padding", "truncation")
# A larger model_max_length means that the tokenizer knows none.
_LONGEST_CONTEXT = 1 << 30


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a hub name.

    Args:
        name_or_path: a folder or a hub name, or the path of a GGUF file (see `model_files`).
        revision: branch, tag or commit of a hub tokenizer.
        trust_remote_code: allow a hub tokenizer to run code from its repository.
        chat_template: path of a Jinja template that replaces the tokenizer's own.
        gguf_file: GGUF file in the folder or repository that holds the tokenizer, unless the folder
            has one of its own.

    Raises:
        ConfigError: there is no such tokenizer, or the template cannot be read.
    """
    from transformers import AutoTokenizer

    files = model_files(name_or_path, gguf_file)
    options = files.tokenizer_options
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.name, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise_translated(error)
        if (refusal := gguf_refusal(files, error)) is not None:
            raise refusal from error
        raise ConfigError(
            "the tokenizer is a folder with tokenizer files, or a hub name",
            received=f"{name_or_path!r} ({str(error).splitlines()[0]})",
            remedy="correct tokenizer_name_or_path",
        ) from error
    if options:
        tokenizer.name_or_path = str(files)  # datasets record it, to load the tokenizer again
    if chat_template is not None:
        try:
            tokenizer.chat_template = read_text(chat_template)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "chat_template is the path of a Jinja file",
                received=f"{chat_template} ({error})",
                remedy="correct the path",
            ) from error
    return tokenizer


def named_end_ids(name_or_path: str) -> frozenset[int]:
    """Ids of the tokens that end a response, by the generation config beside a tokenizer.

    Returns:
        The ids; none if there is no generation config or it names none.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return frozenset()
    ids = config.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def load_policy_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by its settings; errors as `load_tokenizer`."""
    own, model = settings.tokenizer_name_or_path, settings.model_name_or_path
    # With an adapter, gguf_file is a file of its base model.
    elsewhere = own is not None or (Path(model) / "adapter_config.json").is_file()
    return load_tokenizer(
        own or model,
        gguf_file=None if elsewhere else settings.gguf_file,
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
    )


def known_context(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that the tokenizer's model can read, as far as the tokenizer's files say it.

    It is `context_length` of the configuration in the tokenizer's folder, or else the tokenizer's
    `model_max_length`, which tokenizers without a known limit set to a huge number. No model is
    loaded, and the hub is not asked, so this is good for a warning and not for a refusal.

    Returns:
        The number of tokens; None if it is not known, or if the model has no limit.
    """
    folder = Path(str(tokenizer.name_or_path))
    if (folder / "config.json").is_file():
        from transformers import AutoConfig

        with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
            return context_length(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 0 < limit <= _LONGEST_CONTEXT else None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what determines token ids: the tokenizer's model, its added and special tokens,
    and its chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any
    if backend is not None:
        content = json.loads(backend.to_str())
        for key in _PER_CALL_KEYS:
            content.pop(key, None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return sha256_json(
        {
            "tokenizer": content,
            "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }
    )


def tokenizer_info(tokenizer: PreTrainedTokenizerBase) -> TokenizerInfo:
    """The manifest's record of a tokenizer."""
    return TokenizerInfo(
        name_or_path=str(tokenizer.name_or_path),
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=len(tokenizer),
    )


def check_same_tokenizer(
    expected: str | None, expected_by: str, found: str | None, found_in: str, *, file: Any = None
) -> None:
    """Raise IntegrityError if both fingerprints are known and they differ.

    Args:
        expected: a fingerprint, or None if it is not known.
        expected_by: the owner of `expected`, as named in the error.
        found: the other fingerprint, or None.
        found_in: the owner of `found`, as named in the error.
        file: the file named in the error.
    """
    if expected is None or found is None or expected == found:
        return
    raise IntegrityError(
        f"{found_in} uses the tokenizer and chat template of {expected_by} "
        f"(fingerprint {expected[:12]}…)",
        received=f"{found[:12]}…",
        remedy="use that tokenizer, or import the log again with this one",
        file=file,
    )
