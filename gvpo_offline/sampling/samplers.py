"""From a sampler's settings to the sampler; only the kind at hand is imported."""

from __future__ import annotations

from gvpo_offline.sampling.dialect import DatasetTokenizer
from gvpo_offline.sampling.settings import (
    BatchSettings,
    OpenAISettings,
    SamplingSettings,
    TransformersSettings,
    VllmSettings,
)
from gvpo_offline.sampling.stage import Sampler


def open_sampler(settings: SamplingSettings, dialect: DatasetTokenizer) -> Sampler:
    """The sampler that `settings` describe.

    Args:
        settings: of one of the kinds of `config.KINDS`.
        dialect: the dataset's tokenizer and template.

    Raises:
        ConfigError: the kind's package is not installed.
    """
    if isinstance(settings, TransformersSettings):
        from gvpo_offline.sampling.local import TransformersSampler

        return TransformersSampler(settings, dialect)
    if isinstance(settings, VllmSettings):
        from gvpo_offline.sampling.vllm import VllmSampler

        return VllmSampler(settings, dialect)
    if isinstance(settings, OpenAISettings):
        from gvpo_offline.sampling.server import ServerSampler

        return ServerSampler(settings)
    from gvpo_offline.sampling.batch import BatchSampler

    assert isinstance(settings, BatchSettings)
    return BatchSampler(settings)
