"""The policies of trials whose answers are sampled: trained, kept on disk, and judged.

A trial's policy may have to give more answers long after it was trained. So its trained parameters
(with LoRA those of the adapter alone) are kept in a file until the trial is significantly worse
than the best one. To train it again instead would cost a whole trial, and there are only as many
files as trials that do not differ significantly. Where a file is missing, the policy is trained
again, which gives the same weights on the same machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from gvpo_offline.collectives import broadcast_from_rank0, gather_results, raise_together
from gvpo_offline.errors import ConfigError
from gvpo_offline.files import storage_errors
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import identity_settings
from gvpo_offline.sampled_eval.evaluator import SampledEvaluator
from gvpo_offline.sampled_eval.result import Estimate
from gvpo_offline.sampled_eval.shown import failure_lines
from gvpo_offline.store.commit import create_only
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.tune.answers import AnswerSums, answers_name, read_answers, read_diverged
from gvpo_offline.tune.candidates import settings_of_loss
from gvpo_offline.tune.judged import TrialSettings
from gvpo_offline.tune.policy_files import read_parameters, write_parameters
from gvpo_offline.tune.racing import PromptEstimates
from gvpo_offline.tune.trial_files import trial_text
from gvpo_offline.tune.trials import Trials, TrialTrainer, stays_finite

logger = logging.getLogger(__name__)
_POLICIES = "policies"


class JudgedTrainer(TrialTrainer):
    """A short run whose policy answers prompts, or a policy that was trained before."""

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the parameters that are trained, whole; every rank must call this.

        Returns:
            By name; with FSDP2 only on the first rank.
        """
        names = {n for n, p in self._bare().named_parameters() if p.requires_grad}
        held = self.accelerator.get_state_dict(self.model)
        return {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in held.items()
            if name in names
        }

    def load_parameters(self, path: Path) -> None:
        """Take over the parameters in a file of `trained_parameters`; every rank must do so.

        Raises:
            ConfigError: the file is of another model.
            IntegrityError: it is damaged.
        """
        held = read_parameters(path)
        own = {n: p for n, p in self._bare().named_parameters() if p.requires_grad}
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in held.items()}:
            raise ConfigError(
                "the file of a trial's policy has the parameters that the trial trains",
                received="other names or shapes",
                remedy="remove the file; the policy is then trained again",
                file=path,
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(held[name].to(parameter))

    def _bare(self) -> torch.nn.Module:
        bare: torch.nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return bare


@dataclass(frozen=True)
class PolicyOfTrial:
    """The handle of a policy: its settings (None: the untouched policy) and the name of its files.

    Attributes:
        settings: of the trial.
        stem: beginning of the names of its answers' files, which depends on the judge too.
        weights: name of the file of its parameters, which does not.
        key: what the answers depend on, as plain data.
    """

    settings: TrialSettings | None
    stem: str
    weights: str
    key: Mapping[str, Any]


@dataclass(frozen=True)
class JudgedTrials:
    """Trains the trials of a search and samples their answers, with both kept in files.

    Attributes:
        trials: makes the trainers; its `identity` has all that the weights depend on besides the
            trial's settings and steps.
        evaluator: draws and scores answers.
        judge_identity: what the answers depend on besides the weights, as plain data.
        run: the settings of the run, by name, of which each loss takes those that it has.
        steps: optimizer steps of each trial.
        fewest: answers per prompt that are drawn while a trained policy is in memory.
    """

    trials: Trials
    evaluator: SampledEvaluator
    judge_identity: Mapping[str, Any]
    run: Mapping[str, Any]
    steps: int
    fewest: int

    @property
    def untouched(self) -> PolicyOfTrial:
        """The policy before training."""
        return self.handle(None)

    def trial(self, settings: TrialSettings) -> PolicyOfTrial | None:
        """Train a policy and sample its first answers, unless there are files of them.

        Returns:
            Its handle; None if training diverged.
        """
        handle = self.handle(settings)
        if not self._has_diverged(handle) and self._answers(handle, self.fewest)[0] is None:
            self._sample(handle, range(self.fewest))
        if self._has_diverged(handle):
            self.trials.log(f"{described(settings)}: training diverged")
            return None
        return handle

    def judge(self, handle: PolicyOfTrial, samples: int) -> PromptEstimates:
        """Estimates from the first answers to each prompt; draws those that are in no file.

        A policy whose logits are not finite at a later answer has no reward at any prompt, and so
        loses as one that diverged before.

        Raises:
            ConfigError: there are no answers of a policy that gave some before.
        """
        found, number = self._answers(handle, samples)
        if number < samples:
            self._sample(handle, range(number, samples))
            found, _ = self._answers(handle, samples)
        if found is None:
            raise ConfigError(
                "a trial gives the same policy when it is repeated",
                received=f"{described(handle.settings)}: training diverged this time",
                remedy="continue the search on the machine that began it",
            )
        own = found.estimates()
        if self._has_diverged(handle):
            return replace(own, rewards_P=np.full_like(own.rewards_P, np.nan))
        return own

    def sums(self, handle: PolicyOfTrial, samples: int) -> AnswerSums | None:
        """Sums over the answers so far, the first `samples` of each prompt."""
        return self._answers(handle, samples)[0]

    def release(self, handle: PolicyOfTrial) -> None:
        """Remove the file of a policy's parameters."""
        broadcast_from_rank0(lambda: self._weights(handle).unlink(missing_ok=True))

    def clear(self) -> None:
        """Remove the files of all policies' parameters."""

        def remove() -> None:
            folder = self.trials.folder / _POLICIES
            for path in [*folder.glob("*.safetensors"), *folder.glob("*.tmp")]:
                path.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()

        broadcast_from_rank0(remove)

    # ---- files ----

    def handle(self, settings: TrialSettings | None) -> PolicyOfTrial:
        """The handle of a trial's policy."""
        trained: dict[str, Any] = {"kind": "judged", **self.trials.identity}
        if settings is None:
            name = "untouched"
        else:
            objective = identity_settings(self._args(settings, Path()).objective())
            rate = settings.learning_rate
            trained |= {"steps": self.steps, "learning_rate": rate, "objective": objective}
            name = (
                f"{settings.loss_type}-imitation-{settings.imitation:g}-beta-{settings.beta:g}"
                f"-rate-{settings.learning_rate:g}"
            )
        key = {**trained, "judge": dict(self.judge_identity)}
        return PolicyOfTrial(
            settings,
            f"judged-{name}-{sha256_json(key)[:12]}",
            f"{name}-{sha256_json(trained)[:12]}.safetensors",
            key,
        )

    def _answers(self, handle: PolicyOfTrial, most: int) -> tuple[AnswerSums | None, int]:
        folder = self.trials.folder / "trials"
        return broadcast_from_rank0(lambda: read_answers(folder, handle.stem, most))

    def _diverged(self, handle: PolicyOfTrial) -> Path:
        return self.trials.folder / "trials" / f"{handle.stem}-diverged.json"

    def _has_diverged(self, handle: PolicyOfTrial) -> bool:
        return broadcast_from_rank0(lambda: read_diverged(self._diverged(handle)))

    def _weights(self, handle: PolicyOfTrial) -> Path:
        return self.trials.folder / _POLICIES / handle.weights

    # ---- policies ----

    def _sample(self, handle: PolicyOfTrial, numbers: range) -> None:
        """Draw answers and write their sums; or write that the policy diverged."""
        with tempfile.TemporaryDirectory(prefix="gvpo-offline-tune-") as scratch:
            self._sample_in(handle, numbers, Path(scratch))
        clear_device_cache(garbage_collection=True)

    def _sample_in(self, handle: PolicyOfTrial, numbers: range, scratch: Path) -> None:
        own, weights = handle.settings, self._weights(handle)
        if own is None:
            self._draw(handle, self._untrained(scratch, None), numbers)
            return
        if all(gather_results(weights.exists)):  # each rank reads the file, on its own machine
            kept = self._untrained(scratch, weights)
            if not stays_finite(lambda: self._draw(handle, kept, numbers)):
                self._write(handle, self._diverged(handle).name, {"diverged": True})
            return
        trainer: JudgedTrainer = self.trials.trainer(self._args(own, scratch), JudgedTrainer)
        draw = functools.partial(self._draw, handle, trainer, numbers)
        if stays_finite(trainer.train) and stays_finite(draw):
            self._keep(handle, trainer)
        else:
            self._write(handle, self._diverged(handle).name, {"diverged": True})

    def _args(self, own: TrialSettings, scratch: Path) -> GVPOConfig:
        """The settings of a trial's training."""
        args = self.trials.short_args(scratch, own.beta, own.learning_rate, self.steps)
        for name, value in settings_of_loss(own.loss_type, self.run).items():
            setattr(args, name, value)
        args.loss_type, args.imitation = own.loss_type, own.imitation  # type: ignore[assignment]
        return args

    def _untrained(self, scratch: Path, weights: Path | None) -> JudgedTrainer:
        """A trainer with the initial weights, or with those of a file."""
        args = self.trials.short_args(scratch, self.trials.args.beta, 0.0, 1)
        args.warmup_steps, args.reference_check = 0, "off"
        trainer: JudgedTrainer = self.trials.trainer(args, JudgedTrainer)
        if weights is not None:
            raise_together(lambda: trainer.load_parameters(weights))
        if trainer.is_fsdp_enabled:
            trainer.train()  # a step of learning rate 0: FSDP2 shards a model when training starts
        return trainer

    def _draw(self, handle: PolicyOfTrial, trainer: JudgedTrainer, numbers: range) -> None:
        """Draw answers of the policy of a trainer, and write their sums."""
        trainer.check_can_evaluate()
        found = self.evaluator.evaluate(trainer.sampled_policy(), numbers)
        sums = AnswerSums.of(found)
        if handle.settings is None and not found.reward.n:
            raise ConfigError(  # before the answers are written, since a file would be kept
                "eval_reward has a number for some answers of the untouched policy",
                received=" ".join(failure_lines(found, most=1)).strip(),
                remedy="correct the reward, or start its server; then run the command again",
            )
        content = {"causes": dict(found.causes), "prompts": sums.plain()}
        self._write(handle, answers_name(handle.stem, numbers), content)
        so_far, number = self._answers(handle, numbers.stop)
        if so_far is not None:
            own = so_far.estimates()
            reward, kl = Estimate.of(own.rewards_P), Estimate.of(own.kls_P)
            self.trials.log(
                f"{described(handle.settings)}: reward {reward.mean:.4g} ± {reward.se:.2g}, KL "
                f"{kl.mean:.4g} ± {kl.se:.2g} nats, from {number} answers per prompt"
            )
        for line in failure_lines(found):
            self.trials.log(line.strip())

    def _write(self, handle: PolicyOfTrial, name: str, content: Mapping[str, Any]) -> None:
        path = self.trials.folder / "trials" / name
        text = trial_text(path, {**handle.key, **content})
        broadcast_from_rank0(lambda: create_only(path, text))

    def _keep(self, handle: PolicyOfTrial, trainer: JudgedTrainer) -> None:
        parameters = trainer.trained_parameters()
        path = self._weights(handle)

        def write() -> None:
            unfinished = path.with_suffix(".tmp")
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_parameters(parameters, unfinished)
            unfinished.replace(path)

        broadcast_from_rank0(write)


def described(settings: TrialSettings | None) -> str:
    """A trial in words."""
    if settings is None:
        return "untouched policy"
    return (
        f"{settings.loss_type}, imitation {settings.imitation:g}, beta {settings.beta:g}, "
        f"learning rate {settings.learning_rate:g}"
    )
