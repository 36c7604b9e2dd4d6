"""The sampler of `kind: vllm`: vLLM in this process, which batches requests with a seed each.

Written against vLLM's documented offline interface (`LLM.generate`, `SamplingParams`,
`TokensPrompt`), which needs a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.finish_reasons import stop_string
from gvpo_offline.sampling.adapters import refuse_adapter
from gvpo_offline.sampling.local import model_info
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import VllmSettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo
from gvpo_offline.sampling.tokenizers import DatasetTokenizer, SamplerTokenizer
from gvpo_offline.tokenizer import load_tokenizer

# vLLM's finish reasons of responses that were not aborted.
_ENDED = {"stop": "stop", "length": "length", "repetition": "length"}


class VllmSampler:
    """Samples from a model with vLLM; see `Sampler`."""

    def __init__(self, settings: VllmSettings, dataset_tokenizer: DatasetTokenizer) -> None:
        self._settings = settings
        self._dataset_tokenizer = dataset_tokenizer
        self._llm: Any = None
        self._tokenizer: SamplerTokenizer | None = None

    def info(self) -> SamplerInfo:
        """The model's context length, or the limit that `engine` sets, and its weights.

        Raises:
            ConfigError: there is no such model, or it is an adapter.
        """
        settings = self._settings
        remote = bool(settings.engine.get("trust_remote_code"))
        name, revision = settings.model_name_or_path, settings.model_revision
        refuse_adapter(ModelSettings(name, revision))
        info = model_info(name, revision, remote_code=remote)
        return SamplerInfo(
            settings.engine.get("max_model_len") or info.context_length, info.identity
        )

    def check(self) -> None:
        """Check that vLLM is installed."""
        if importlib.util.find_spec("vllm") is None:
            raise _not_installed("it is not installed")

    def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: vLLM is not installed.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise _not_installed(str(error)) from error
        settings = self._settings
        # Log-probs of the distribution drawn from, as all samplers report them.
        options = {"logprobs_mode": "processed_logprobs", **settings.engine}
        self._llm = LLM(
            model=settings.model_name_or_path, revision=settings.model_revision, **options
        )
        own = load_tokenizer(settings.model_name_or_path, revision=settings.model_revision)
        self._tokenizer = SamplerTokenizer(own, self._dataset_tokenizer)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """A response to each request."""
        assert self._tokenizer is not None
        prompts = {request.prompt.index: request.prompt for request in requests}
        found = self._tokenizer.prompt_ids(list(prompts.values()))
        ids = dict(zip(prompts, found, strict=True))
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids[request.prompt.index].tolist()} for request in requests],
            [self._params(request.seed) for request in requests],
            use_tqdm=False,
        )
        pairs = zip(requests, outputs, strict=True)
        return [self._sample(request, output.outputs[0]) for request, output in pairs]

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams

        settings = self._settings
        return SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            max_tokens=settings.max_new_tokens,
            stop=settings.stop,
            include_stop_str_in_output=True,
            seed=seed,
            logprobs=0,
        )

    def _sample(self, request: SampleRequest, output: Any) -> Sample:
        assert self._tokenizer is not None
        ids = list(output.token_ids)
        text = self._tokenizer.text(ids)
        ended = _ENDED.get(output.finish_reason)
        if ended is None:
            return request.failed(f"the finish reason {output.finish_reason!r}")
        if not (ids and (self._tokenizer.same_as_dataset or text)):
            return request.failed("an empty text")
        logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        return Sample(
            prompt=request.prompt.index,
            number=request.number,
            seed=request.seed,
            text=text,
            token_ids=np.array(ids, np.int32) if self._tokenizer.same_as_dataset else None,
            token_logprobs=np.array(logprobs, np.float32),
            finish_reason=ended,
            stop_string=stop_string(output.finish_reason, output.stop_reason),
        )


def _not_installed(found: str) -> ConfigError:
    return ConfigError(
        "kind: vllm needs the package vllm",
        received=found,
        remedy="pip install 'gvpo-offline[vllm]'",
    )
