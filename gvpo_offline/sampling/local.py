"""The sampler of `kind: transformers`: a model in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.files import gguf_refusal, model_files
from gvpo_offline.compute.loading import first_line
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.hashing import sha256_file, sha256_json
from gvpo_offline.sampling.adapters import adapter_identity, adapter_of, without_wrapper
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import SamplingSettings, TransformersSettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo
from gvpo_offline.sampling.tokenizers import DatasetTokenizer, SamplerTokenizer
from gvpo_offline.tokenizer import load_policy_tokenizer
from gvpo_offline.workers.progress import advance

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import LogitsProcessorList

    from gvpo_offline.sampling.decode import Completion, Decoder, DecodingRules

_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
# Tokens at the end of a response that are searched for a stop string, beyond the string's length.
_TAIL_TOKENS = 8


def model_info(
    name_or_path: str, revision: str | None, *, remote_code: bool, gguf_file: str | None = None
) -> SamplerInfo:
    """The context length of a transformers model, and a hash or commit of its weights.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoConfig

    files = model_files(name_or_path, gguf_file)
    options = files.options
    try:
        config = AutoConfig.from_pretrained(
            files.name, revision=revision, trust_remote_code=remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        if (refusal := gguf_refusal(files, error)) is not None:
            raise refusal from error
        raise ConfigError(
            "the model is a folder or hub name that transformers loads as a causal language model",
            received=f"{str(files)!r} ({first_line(error)})",
            remedy="correct model_name_or_path",
        ) from error
    folder = Path(files.name)
    if folder.is_dir():
        paths = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
        paths |= {folder / files.gguf_file} if files.gguf_file else set()
        content = "".join(f"{path.name}:{sha256_file(path)}\n" for path in sorted(paths))
        weights = hashlib.sha256(content.encode()).hexdigest()
    else:
        parts = (getattr(config, "_commit_hash", None), files.gguf_file)
        weights = ":".join(str(part) for part in parts[: 1 if files.gguf_file is None else 2])
    return SamplerInfo(context_length(config), {"model": weights})


class TransformersSampler:
    """Samples from a model with `decode.Decoder`; see `Sampler`."""

    def __init__(self, settings: TransformersSettings, dataset_tokenizer: DatasetTokenizer) -> None:
        self._settings = settings
        self._dataset_tokenizer = dataset_tokenizer
        self._decoder: Decoder | None = None
        self._tokenizer: SamplerTokenizer | None = None
        self._context: int | None = None

    def info(self) -> SamplerInfo:
        """The model's context length and its weights, and those of an adapter."""
        settings, held = self._whole_model()
        adapter = {} if held is None else {"adapter": adapter_identity(self._settings)}
        info = model_info(
            settings.model_name_or_path,
            settings.model_revision,
            remote_code=settings.trust_remote_code,
            gguf_file=settings.gguf_file,
        )
        template = load_policy_tokenizer(self._settings).chat_template
        identity = {**info.identity, **adapter, "chat_template": sha256_json(template)}
        return SamplerInfo(info.context_length, identity)

    def _whole_model(self) -> tuple[ModelSettings, PeftConfig | None]:
        """Settings of the model, or of the base model of an adapter, and the adapter's."""
        from gvpo_offline.compute.adapters import base_settings

        held = adapter_of(self._settings)
        return (self._settings if held is None else base_settings(self._settings, held)), held

    def check(self) -> None:
        """Check that the model's files hold all of its weights; see `check_model`."""
        from gvpo_offline.compute.model import check_model

        check_model(self._whole_model()[0])

    def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: it cannot be loaded, has no end token, or keeps its state in a way that
                does not allow batches.
        """
        from gvpo_offline.compute.adapters import load_policy
        from gvpo_offline.compute.model import default_device, disable_dropout
        from gvpo_offline.sampling.decode import Decoder

        settings = self._settings
        model = without_wrapper(load_policy(settings))
        disable_dropout(model)
        model.to(default_device(use_cpu=settings.use_cpu)).eval()
        self._context = context_length(model.config)
        self._tokenizer = SamplerTokenizer(load_policy_tokenizer(settings), self._dataset_tokenizer)
        self._decoder = Decoder(
            model,
            _rules(settings, model.generation_config, self._tokenizer),
            batch_size=settings.batch_size,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self._decoder.probe()

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """A response to each request.

        Raises:
            DataError: a prompt in the model's own tokens leaves no room for max_new_tokens in its
                context.
        """
        from gvpo_offline.sampling.decode import Completion

        assert self._decoder is not None
        assert self._tokenizer is not None
        prompts = list({id(request.prompt): request.prompt for request in requests}.values())
        found = self._tokenizer.prompt_ids(prompts)
        ids = {prompt.index: own for prompt, own in zip(prompts, found, strict=True)}
        for prompt in prompts:
            n_tokens = len(ids[prompt.index]) + self._settings.max_new_tokens
            if self._context is not None and n_tokens > self._context:
                raise DataError(
                    f"prompt and max_new_tokens fit in the model's context of {self._context}",
                    received=f"{n_tokens} tokens",
                    remedy="shorten the prompt, or lower max_new_tokens",
                    file=prompt.source,
                    row=prompt.row,
                )
        completions = [Completion(ids[r.prompt.index], r.seed) for r in requests]
        for _ in self._decoder.run(completions):
            advance()
        pairs = zip(requests, completions, strict=True)
        return [_sample(request, completion, self._tokenizer) for request, completion in pairs]


def _sample(request: SampleRequest, completion: Completion, tokenizer: SamplerTokenizer) -> Sample:
    text = tokenizer.text(completion.ids)
    if not (tokenizer.same_as_dataset or text):
        return request.failed("an empty text from a model whose tokenizer is not the dataset's")
    return Sample(
        prompt=request.prompt.index,
        number=request.number,
        seed=request.seed,
        text=text,
        token_ids=np.array(completion.ids, np.int32) if tokenizer.same_as_dataset else None,
        token_logprobs=np.array(completion.logprobs, np.float32),
        finish_reason=completion.finish_reason,
        stop_string="" if completion.stopped_by_string else None,
    )


def end_token_ids(
    generation_config: Any, eos_token_id: int | None, end_of_turn: int | None
) -> frozenset[int]:
    """The tokens that end a response of a model.

    Args:
        generation_config: the model's, or None.
        eos_token_id: the tokenizer's.
        end_of_turn: the token with which the chat template ends a turn; None without one.

    Raises:
        ConfigError: there is none.
    """
    named = [
        generation_config.eos_token_id if generation_config else None,
        eos_token_id,
        end_of_turn,
    ]
    ends = {i for ids in named if ids is not None for i in ([ids] if isinstance(ids, int) else ids)}
    if not ends:
        raise ConfigError(
            "a response ends with an end token",
            received="a model and a tokenizer without one (eos_token_id)",
            remedy="set it in the model's generation_config.json",
        )
    return frozenset(ends)


def _rules(
    settings: SamplingSettings, generation_config: Any, tokenizer: SamplerTokenizer
) -> DecodingRules:
    from gvpo_offline.sampling.decode import DecodingRules

    ends = end_token_ids(generation_config, tokenizer.tokenizer.eos_token_id, tokenizer.end_of_turn)
    return DecodingRules(
        processors=logits_processors(settings),
        greedy=settings.temperature == 0,
        end_ids=ends,
        max_new_tokens=settings.max_new_tokens,
        stops=_stops(settings.stop, tokenizer) if settings.stop else None,
    )


def logits_processors(settings: SamplingSettings) -> LogitsProcessorList:
    """transformers' logits processors, in the order in which `generate` applies them."""
    import transformers as hf

    found: list[Any] = []
    if settings.repetition_penalty != 1:
        found.append(hf.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature not in (0, 1):
        found.append(hf.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(hf.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(hf.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(hf.MinPLogitsWarper(settings.min_p))
    return hf.LogitsProcessorList(found)


def _stops(strings: Sequence[str], tokenizer: SamplerTokenizer) -> Callable[[Sequence[int]], bool]:
    """Whether the text at the end of some token ids holds a stop string.

    Not transformers' StopStringCriteria, which also finds strings that begin in the prompt.
    """
    # A token is at least a byte long, and a character at most four.
    tail = 4 * max(map(len, strings)) + _TAIL_TOKENS

    def stops(ids: Sequence[int]) -> bool:
        text = tokenizer.text(ids[-tail:])
        return any(string in text for string in strings)

    return stops
