"""Reward models: sequence classifiers with one logit, applied to the whole conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.files import model_files
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import RewardModelSettings
from gvpo_offline.rewards.scorer import SimpleScorer, settings_of
from gvpo_offline.tokenizer import load_tokenizer, tokenizer_fingerprint
from gvpo_offline.workers.progress import advance, portion

# Settings that say where the model is and where it runs.
_NAMES = ("model_name_or_path", "model_revision", "trust_remote_code", "use_cpu", "gguf_file")


class ModelScorer(SimpleScorer):
    """Returns logits[:, 0] of a sequence classifier with one label; batches are right-padded.

    Prompt and response are rendered by the model's own chat template; with `as_chat: false` a
    prompt that is text is followed by the response as it is. Responses of one row group are batched
    by length, so that batches do not depend on the number of workers.
    """

    def __init__(self, settings: RewardModelSettings) -> None:
        super().__init__()
        self._settings = settings
        self._model: Any = None
        self._tokenizer: Any = None

    def identity(self) -> dict[str, Any]:
        """The settings, and the fingerprints of weights and tokenizer.

        Raises:
            ConfigError: the model does not exist, or has more than one label.
        """
        from gvpo_offline.compute.model import dtype_name, weights_sha256

        self._load()
        described = settings_of(self._settings)
        for name in _NAMES:  # the hash of the weights identifies the model
            described.pop(name, None)
        return {
            **described,
            "dtype": dtype_name(next(self._model.parameters()).dtype),
            "weights_sha256": weights_sha256(self._model),
            "tokenizer_fingerprint": tokenizer_fingerprint(self._tokenizer),
        }

    def start(self) -> None:
        """Load the model, onto a GPU if there is one."""
        from gvpo_offline.compute.model import default_device

        self._load()
        self._model.to(default_device(use_cpu=self._settings.use_cpu)).eval()

    def _load(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModelForSequenceClassification

        from gvpo_offline.compute.loading import load_pretrained

        settings = self._settings
        options: dict[str, Any] = {
            "revision": settings.model_revision,
            "trust_remote_code": settings.trust_remote_code,
        }
        files = model_files(settings.model_name_or_path, settings.gguf_file)
        tokenizer = load_tokenizer(str(files), **options)
        model = load_pretrained(
            AutoModelForSequenceClassification,
            files,
            what="a sequence classifier",
            dtype=settings.dtype,
            **options,
        )
        if model.config.num_labels != 1:
            raise ConfigError(
                "a reward model has one label",
                received=f"{settings.model_name_or_path} with {model.config.num_labels}",
                remedy="use a model that was trained as a reward model (num_labels=1)",
            )
        _agree_on_padding(model, tokenizer)
        self._model, self._tokenizer = model, tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_tokenizer": None}

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each group."""
        rows = [ids for group in groups for ids in self._encoded(group)]
        scores = np.zeros(len(rows))
        with portion(len(groups), len(rows)):
            for members in self._batches([len(row) for row in rows]):
                scores[members] = self._logits([rows[i] for i in members])
                advance(len(members))
        ends = np.cumsum([group.size for group in groups])[:-1]
        return [piece[np.newaxis] for piece in np.split(scores, ends)]

    def _encoded(self, group: ScoringInput) -> list[list[int]]:
        texts = [self._text(group, index) for index in range(group.size)]
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        limit = context_length(self._model.config)
        longest = max(map(len, found))
        if limit is not None and longest > limit:
            raise DataError(
                f"prompt and response fit into the reward model's {limit} positions",
                received=f"{longest} tokens",
                remedy="use another reward model, or import with a smaller max_length",
                **group.location,
            )
        return found

    def _text(self, group: ScoringInput, index: int) -> str:
        if group.messages is None and not self._settings.as_chat:
            return f"{group.prompt}{group.responses[index]}"
        messages = [*group.conversation, *group.turns(index)]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise DataError(
                "the reward model's chat template can render prompt and response",
                received=f"{type(error).__name__}: {error}",
                remedy="use a model with a chat template, or set as_chat: false for text prompts",
                **group.location,
            ) from error
        return text

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows in batches of at most max_tokens_per_batch tokens, the longest first.

        A row that exceeds the limit is a batch of its own.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        while order:
            width = max(1, self._settings.max_tokens_per_batch // max(1, lengths[order[0]]))
            yield order[:width]
            order = order[width:]

    def _logits(self, rows: Sequence[list[int]]) -> FloatArray:
        import torch

        batch = self._tokenizer.pad(
            {"input_ids": list(rows)}, padding=True, padding_side="right", return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            logits = self._model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        found: FloatArray = logits[:, 0].to("cpu", torch.float64).numpy()
        return found


def _agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Give model and tokenizer one padding id, by which the classifier finds the last token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "a reward model's tokenizer has a padding or an end-of-sequence token",
            received="neither",
            remedy="save the tokenizer with one",
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
