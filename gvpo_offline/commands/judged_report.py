"""What `tune` with `judge: sample` prints and writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.files import replace_text
from gvpo_offline.sampled_eval.result import Estimate
from gvpo_offline.tune.answers import AnswerSums
from gvpo_offline.tune.judged import JudgedProposal, JudgedTrial
from gvpo_offline.tune.policies import described
from gvpo_offline.tune.racing import is_above
from gvpo_offline.tune.trial_files import trial_text

# Two trials are distinguishable if their paired difference is above this many standard errors.
_DISTINGUISHED = 1.0
_CUT = 0.1
# With fewer prompts a standard error is itself uncertain by more than 1 / sqrt(2 * 20) = 16%.
_FEW_PROMPTS = 20


@dataclass(frozen=True)
class JudgedReport:
    """Result of a search by sampled answers.

    Attributes:
        proposal: the chosen trial, and all trials.
        written: the settings that the proposal sets.
        sums: over the answers of each trial, in the order of `proposal.trials`; None where training
            diverged.
        largest_rate: the largest usable learning rate of the first loss's range test.
        steps: optimizer steps of each trial.
        prompts: number of held-out prompts.
        sampling: what is sampled, in words.
        file: YAML file with the proposal, for `train --config`; None if the untouched policy is
            best, and nothing is proposed.
    """

    proposal: JudgedProposal
    written: dict[str, Any]
    sums: tuple[AnswerSums | None, ...]
    largest_rate: float
    steps: int
    prompts: int
    sampling: str
    file: Path | None

    @property
    def told(self) -> bool:
        """Whether a trial beats the untouched policy; otherwise nothing is proposed."""
        return self.file is not None

    def doubts(self) -> list[dict[str, Any]]:
        """Why the proposal may be wrong: nothing_gained where nothing is proposed; else whatever
        `is not distinguishable`, as data.
        """
        found = self.proposal
        if not self.told:
            return [{"kind": "nothing_gained", "text": self.statements()[0]}]
        rivals = {"the untouched policy": found.untouched}
        rivals["the next best trial"] = found.next
        return [
            {"kind": "not_distinguishable", "text": f"{name} may be as good as the proposal"}
            for name, own in rivals.items()
            if own.behind is not None and _verdict(own.behind)
        ]

    def summary(self) -> dict[str, Any]:
        """The proposal as plain data, without the trials."""
        found = self.proposal
        return {
            "judge": "sample",
            "told": self.told,
            "doubts": self.doubts(),
            "proposed": self.written if self.file else None,
            "judge_beta": found.judge_beta,
            "chosen": _plain(found.chosen),
            "untouched": _plain(found.untouched),
            "next": _plain(found.next),
            "largest_rate": self.largest_rate,
            "steps": self.steps,
            "held_out_prompts": self.prompts,
            "answers": found.samples * self.prompts,
            "statements": self.statements(),
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, with the trials."""
        trials = [
            {**_plain(trial), **_answers(sums)}
            for trial, sums in zip(self.proposal.trials, self.sums, strict=True)
        ]
        return {**self.summary(), "sampling": self.sampling, "trials": trials}

    def table(self) -> str:
        """The trials as text, in the order in which they ran; a star marks the chosen one."""
        beta = self.proposal.judge_beta
        head = (
            f"  {'loss':<9} {'imitation':>9} {'beta':>7} {'rate':>8} {'objective':>17} "
            f"{'reward':>8} {'KL':>8} {'answers':>7} {'behind':>17} {'cut':>5} {'failed':>6}"
        )
        words = (
            f"trials of {self.steps} steps; objective: reward - {beta:g} KL, ± standard error over "
            "prompts; behind: the chosen trial's objective minus this one's, paired by prompt"
        )
        lines = [self.sampling, words, head]
        for trial, sums in zip(self.proposal.trials, self.sums, strict=True):
            lines.append(_row(trial, sums, chosen=trial is self.proposal.chosen))
        lines += ["", *self.statements()]
        return "\n".join(lines)

    def statements(self) -> list[str]:
        """How sure the choice is, in sentences."""
        found = self.proposal
        best, untouched, second = found.best, found.untouched, found.next
        if found.chosen is untouched:
            text = (
                f"no trial beats the untouched policy: the best ({described(best.settings)}) is "
                f"{_shown(best.behind)} below it. Nothing is proposed"
            )
            if not best.reward.n:
                text = (
                    "no trial beats the untouched policy: no answer of another one could be "
                    "scored. Nothing is proposed"
                )
            return [text]
        lines = [f"proposed: {described(best.settings)}"]
        if untouched.behind is not None:
            lines.append(
                f"the untouched policy is {_shown(untouched.behind)} below it"
                + _verdict(untouched.behind)
            )
        if second is not untouched and second.behind is not None:
            lines.append(
                f"the next best trial ({described(second.settings)}) is {_shown(second.behind)} "
                f"below it{_verdict(second.behind)}"
            )
        return lines

    def warnings(self) -> list[str]:
        """What may be wrong with the judgement."""
        lines = []
        shares = [
            (trial.failed / float(sums.sums[0].sum()), trial)
            for trial, sums in zip(self.proposal.trials, self.sums, strict=True)
            if sums is not None and trial.failed
        ]
        if shares:
            share, most = max(shares, key=lambda own: own[0])
            lines.append(
                f"{sum(own.failed for _, own in shares):,} sampled answers could not be scored and "
                f"are in no mean reward: {share:.0%} of those of {described(most.settings)}, less "
                "of others. The causes are in the files in trials/; if the reward can score them "
                "now, remove these files and run the command again"
            )
        if self.prompts < _FEW_PROMPTS:
            lines.append(
                f"the standard errors over {self.prompts} held-out prompts are rough: hold out "
                "more (eval_fraction, eval_prompts)"
            )
        cut = [own.truncated_share for own in self.sums if own is not None]
        if cut and max(cut) > _CUT:
            lines.append(
                f"up to {max(cut):.0%} of a policy's answers were cut at the limit of tokens: "
                "raise eval_max_new_tokens"
            )
        return lines

    def write(self, folder: Path) -> None:
        """Write `tune.json`, and `proposed.yaml` or remove that of an earlier search."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tune.json"
        replace_text(path, trial_text(path, self.as_dict()))
        if self.file is None:
            (folder / "proposed.yaml").unlink(missing_ok=True)
            return
        lines = ["# By gvpo-offline tune; `train` takes it after the run's own file."]
        lines += [f"{name}: {json.dumps(value)}" for name, value in self.written.items()]
        replace_text(self.file, "\n".join(lines) + "\n")


def _row(trial: JudgedTrial, sums: AnswerSums | None, *, chosen: bool) -> str:
    mark, own = "*" if chosen else " ", trial.settings
    if own is None:
        named = f"{'untouched':<9} {'':>9} {'':>7} {'':>8}"
    else:
        named = f"{own.loss_type:<9} {own.imitation:>9g} {own.beta:>7g} {own.learning_rate:>8g}"
    if sums is None:
        return f"{mark} {named} training diverged"
    behind = "" if trial.behind is None else _shown(trial.behind)
    return (
        f"{mark} {named} {_shown(trial.objective):>17} {trial.reward.mean:>8.4f} "
        f"{trial.kl.mean:>8.3f} {trial.samples:>7} {behind:>17} {sums.truncated_share:>5.0%} "
        f"{trial.failed:>6}"
    )


def _shown(own: Estimate | None) -> str:
    return "unknown" if own is None or not own.n else f"{own.mean:.4f} ± {own.se:.4f}"


def _verdict(behind: Estimate) -> str:
    if is_above(behind, _DISTINGUISHED):
        return ""
    return ": within one standard error of their paired difference, so not distinguishable"


def _plain(trial: JudgedTrial) -> dict[str, Any]:
    settings = None if trial.settings is None else vars(trial.settings)
    return {
        "settings": settings,
        "samples": trial.samples,
        "failed": trial.failed,
        **{
            name: _estimate(getattr(trial, name))
            for name in ("objective", "reward", "kl", "behind")
        },
    }


def _estimate(own: Estimate | None) -> dict[str, float | None] | None:
    if own is None or own.n == 0:
        return None
    return {"mean": own.mean, "se": own.se if math.isfinite(own.se) else None}


def _answers(sums: AnswerSums | None) -> dict[str, float]:
    if sums is None:
        return {}
    return {"length": sums.mean_length, "truncated": sums.truncated_share}
