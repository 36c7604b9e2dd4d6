"""vLLM in this process: it batches by itself, and takes a seed for each response.

Written against vLLM's documented offline interface (`LLM.generate`, `SamplingParams`,
`TokensPrompt`), which needs a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import ConfigError
from gvpo_offline.sampling.dialect import DatasetTokenizer, SamplerTokenizer
from gvpo_offline.sampling.local import model_info
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import VllmSettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo
from gvpo_offline.tokenizer import load_tokenizer


class VllmSampler:
    """Draws from a model by vLLM; see `Sampler`."""

    def __init__(self, settings: VllmSettings, dialect: DatasetTokenizer) -> None:
        self._settings = settings
        self._dialect = dialect
        self._engine: Any = None
        self._speech: SamplerTokenizer | None = None

    def facts(self) -> SamplerInfo:
        """The model's context, or what `engine` limits it to, and its weights."""
        settings = self._settings
        remote = bool(settings.engine.get("trust_remote_code"))
        facts = model_info(settings.model_name_or_path, settings.model_revision, remote_code=remote)
        return SamplerInfo(
            settings.engine.get("max_model_len") or facts.context_length, facts.identity
        )

    def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: vLLM is not installed.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                "kind: vllm needs the package vllm",
                received=str(error),
                remedy="pip install 'gvpo-offline[vllm]'",
            ) from error
        settings = self._settings
        # Log-probs of what was drawn from, as every sampler here gives them.
        options = {"logprobs_mode": "processed_logprobs", **settings.engine}
        self._engine = LLM(
            model=settings.model_name_or_path, revision=settings.model_revision, **options
        )
        own = load_tokenizer(settings.model_name_or_path, revision=settings.model_revision)
        self._speech = SamplerTokenizer(own, self._dialect)

    def sample(self, wanted: Sequence[SampleRequest]) -> list[Sample]:
        """All of them."""
        assert self._speech is not None
        prompts = {w.prompt.index: w.prompt for w in wanted}
        found = self._speech.prompt_ids(list(prompts.values()))
        ids = dict(zip(prompts, found, strict=True))
        outputs = self._engine.generate(
            [{"prompt_token_ids": ids[w.prompt.index].tolist()} for w in wanted],
            [self._params(w.seed) for w in wanted],
            use_tqdm=False,
        )
        pairs = zip(wanted, outputs, strict=True)
        return [self._sample(w, output.outputs[0]) for w, output in pairs]

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

    def _sample(self, wanted: SampleRequest, output: Any) -> Sample:
        assert self._speech is not None
        ids = list(output.token_ids)
        text = self._speech.text(ids)
        if output.finish_reason not in ("stop", "length"):
            return wanted.failed(f"the finish reason {output.finish_reason!r}")
        if not (ids and (self._speech.shared or text)):
            return wanted.failed("an empty text")
        logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        return Sample(
            prompt=wanted.prompt.index,
            number=wanted.number,
            seed=wanted.seed,
            text=text,
            token_ids=np.array(ids, np.int32) if self._speech.shared else None,
            token_logprobs=np.array(logprobs, np.float32),
            finish_reason=output.finish_reason,
        )
