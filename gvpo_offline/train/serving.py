"""What makes a saved policy ready to be served: end tokens, the cache, a portable tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.compute.adapters import is_adapted
from gvpo_offline.errors import GVPOError
from gvpo_offline.files import replace_text

_TOKENIZER_CONFIG = "tokenizer_config.json"
# transformers 5 writes a class name that transformers 4, and the servers that use it, do not have.
_NEWER_CLASS, _OLDER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
# How the tokenizer was loaded for the run; not of the tokenizer.
_OF_LOADING = ("is_local", "local_files_only")


@contextlib.contextmanager
def ready_to_serve(model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """A context in which a model and its tokenizer are saved so that servers run them as they are.

    - `generation_config.eos_token_id` names every token that ends a response: with the model's own
      ones, the tokenizer's and the one with which the chat template ends a turn. It stays so.
    - `config.use_cache` is true, which transformers' Trainer sets to false for training.
    - The tokenizer's files are those that transformers 4 reads too.

    Args:
        model: a transformers model, or a PEFT model around one.
        tokenizer: the tokenizer that is saved with it, or None.
    """
    owner: Any = model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]
    config: Any = getattr(owner, "config", None)
    before = getattr(config, "use_cache", None)
    _name_end_tokens(owner, tokenizer)
    with portable_tokenizer(tokenizer):
        try:
            if before is False:
                config.use_cache = True
            yield
        finally:
            if before is False:
                config.use_cache = before


def _name_end_tokens(owner: Any, tokenizer: Any) -> None:
    generation = getattr(owner, "generation_config", None)
    if generation is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    named = generation.eos_token_id
    ends = [named] if isinstance(named, int) else list(named or [])
    more = [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    found = list(dict.fromkeys([*ends, *(end for end in more if end is not None)]))
    if found and found != ends:
        generation.eos_token_id = found[0] if len(found) == 1 else found


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends a turn; None without one."""
    try:
        return Encoder(tokenizer, append_eos=False).end_of_turn
    except GVPOError:  # a template that this package cannot use
        return None


@contextlib.contextmanager
def portable_tokenizer(tokenizer: Any) -> Iterator[None]:
    """A context in which `tokenizer.save_pretrained` writes what transformers 4 reads too."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        yield
        return
    save: Any = tokenizer.save_pretrained

    def saved(folder: Any, *args: Any, **kwargs: Any) -> Any:
        files = save(folder, *args, **kwargs)
        make_portable(Path(folder))
        return files

    held: Any = tokenizer
    own = "save_pretrained" in vars(held)
    held.save_pretrained = saved
    try:
        yield
    finally:
        if own:
            held.save_pretrained = save
        else:
            del held.save_pretrained


def make_portable(folder: Path) -> None:
    """Mend the configuration of a tokenizer that transformers 5 saved, if the folder has one."""
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    content = json.loads(before)
    kept = {name: value for name, value in content.items() if name not in _OF_LOADING}
    if kept.get("tokenizer_class") == _NEWER_CLASS:
        kept["tokenizer_class"] = _OLDER_CLASS
    # transformers 4 reads a list under this name alone; transformers 5 reads it as well.
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept != content:
        text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
        replace_text(path, text + "\n")


def name_rotary_base(folder: Path) -> None:
    """Write the rotary embedding's settings into a saved config.json under their earlier names too.

    transformers 5 writes `rope_parameters` alone. transformers 4 does not read it: it would compute
    with its own base of 10,000, without an error, and give other answers. Models whose layers have
    different settings are left as they are: they have no earlier names in common.

    Args:
        folder: of the saved model; nothing happens without a config.json, as for an adapter.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return
    scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
    earlier = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        earlier["rope_scaling"] = scaled
    if "partial_rotary_factor" in rope:
        earlier["partial_rotary_factor"] = rope["partial_rotary_factor"]
    text = json.dumps({**earlier, **content}, indent=2, sort_keys=True)
    replace_text(path, text + "\n")
