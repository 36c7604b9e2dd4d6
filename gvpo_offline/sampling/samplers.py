"""Makes samplers from their settings; imports a kind's module only when it is used."""

from __future__ import annotations

from gvpo_offline.limits import Limits
from gvpo_offline.sampling.settings import (
    BatchSettings,
    OpenAISettings,
    SamplingSettings,
    TransformersSettings,
    VllmSettings,
)
from gvpo_offline.sampling.stage import Sampler
from gvpo_offline.sampling.tokenizers import DatasetTokenizer


def open_sampler(
    settings: SamplingSettings, dataset_tokenizer: DatasetTokenizer, limits: Limits
) -> Sampler:
    """The sampler that `settings` describe.

    Args:
        settings: of one of the kinds of `config.KINDS`.
        dataset_tokenizer: the dataset's tokenizer and template.
        limits: bounds on what a result file of a batch may hold.

    Raises:
        ConfigError: the kind's package is not installed.
    """
    if isinstance(settings, TransformersSettings):
        from gvpo_offline.sampling.local import TransformersSampler

        return TransformersSampler(settings, dataset_tokenizer)
    if isinstance(settings, VllmSettings):
        from gvpo_offline.sampling.vllm import VllmSampler

        return VllmSampler(settings, dataset_tokenizer)
    if isinstance(settings, OpenAISettings):
        from gvpo_offline.sampling.server import ServerSampler

        return ServerSampler(settings)
    from gvpo_offline.sampling.batch import BatchSampler

    assert isinstance(settings, BatchSettings)
    return BatchSampler(settings, limits)
