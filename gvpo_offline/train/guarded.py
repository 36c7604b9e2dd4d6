"""A Trainer that neither goes on from what is not finite, nor loses steps to a signal.

Ranks agree once per step, by one reduction of two integers: on whether log-probs were not finite
anywhere, and on whether a rank received a signal. Therefore all ranks stop at the same step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from gvpo_offline.collectives import broadcast_from_rank0, gather_results
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupLoss, GroupStatistics
from gvpo_offline.losses.checks import deferred_checks
from gvpo_offline.train.checkpoint import checkpoint_folders, is_sealed
from gvpo_offline.train.checkpointing import CheckpointingTrainer
from gvpo_offline.train.nonfinite import (
    NonFinite,
    StepFaults,
    add_skipped,
    all_finite,
    check_can_skip,
    ids_and_samplers,
    is_evaluation_due,
    largest_of_ranks,
    norm_is_finite,
    set_evaluation_due,
    skipped_steps,
    weights_are_finite,
)
from gvpo_offline.train.run_lock import run_lock
from gvpo_offline.train.stopping import (
    RunStopped,
    StopRequests,
    ignore_signals,
    signal_numbers,
    stop_requests,
)

if TYPE_CHECKING:
    from gvpo_offline.compute.engine import Engine
    from gvpo_offline.stream.steps import StepShare
    from gvpo_offline.train.objective import Objective

logger = logging.getLogger(__name__)


Method = TypeVar("Method", bound=Callable[..., Any])


def guards_run(method: Method) -> Method:
    """Decorator of a trainer's `train`: it alone writes to its folder, and notes signals."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder, names = Path(self.args.output_dir), self.args.stop_signals
        with run_lock(folder, broadcast_from_rank0), stop_requests(names) as requests:
            self.begin_guarding(requests)
            try:
                return method(self, *args, **kwargs)
            finally:
                self.end_guarding()

    return cast(Method, guarded)


class GuardedTrainer(CheckpointingTrainer):
    """A Trainer that stops, or skips a step, where values are not finite; and stops at a signal.

    Attributes:
        stop_requests: the signals that this process receives while it trains; None: none count.
        saves_when_stopped: whether a signal leaves a checkpoint.
    """

    engine: Engine
    _objective: Objective
    stop_requests: StopRequests | None = None
    saves_when_stopped = True
    _stopped_by = 0  # the signal on which all ranks have agreed
    _skips = False  # whether the present step is skipped
    _sound: Tensor | None = None  # whether the checks of the last micro-batch hold; None: they do
    _filters: bool | None = None  # the setting logging_nan_inf_filter, while it is off
    _share: StepShare | None = None
    _checked_step = -1  # the step after which weights and log-probs were found finite
    _lost_steps = 0  # steps without a loss since the last logged line
    _logged_step: int | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers; errors also as `check_can_skip`."""
        super().create_accelerator_and_postprocess()
        check_can_skip(self.args, deepspeed=bool(self.is_deepspeed_enabled))

    @property
    def worker_init(self) -> Callable[[int], None]:
        """What a data loader's worker does first: ignore the signals that stop the run."""
        return functools.partial(ignore_signals, signal_numbers(self.args.stop_signals))

    def begin_guarding(self, requests: StopRequests) -> None:
        """Begin a run, which the requests may stop."""
        self.stop_requests = requests
        self._stopped_by, self._skips, self._share, self._checked_step = 0, False, None, -1
        self._lost_steps, self._logged_step = 0, None

    def end_guarding(self) -> None:
        """End it. After a short run that leaves no checkpoint a signal counts at once again."""
        if self.stop_requests is not None and not self.saves_when_stopped:
            self.stop_requests.waits = False
        self.stop_requests = None
        self._restore_filter()

    # ---- within a step ----

    def begin_step(self, share: StepShare) -> None:
        """Take note of the groups of this rank's step."""
        first = self._share is None
        self._share, self._faults = share, StepFaults()
        if self._logged_step is None:
            self._logged_step = self.state.global_step
        if first and self.stop_requests is not None:
            self.stop_requests.waits = True
        if first and is_evaluation_due(self.state):
            self._evaluate_late()

    def sound_loss(
        self, objective: Objective, logprobs_R: Tensor, groups: Sequence[Group]
    ) -> GroupLoss | None:
        """The loss of a micro-batch; None, and its groups noted, if log-probs are not finite.

        On a GPU whether they are is read at the end of the step, by `agree`. The rank then goes on
        to the end of the step with some gradient, since other ranks wait for it there.

        Raises:
            DataError: as the objective, where the groups' own values are at fault.
        """
        try:
            with deferred_checks() as checks:
                loss = objective(logprobs_R, groups)
            self._sound = self._faults.wait(groups, logprobs_R, checks) if checks else None
            return loss
        except DataError:
            before = len(self._faults.groups)
            self._faults.note(groups, logprobs_R)
            if len(self._faults.groups) == before:
                raise
            return None

    def sound_statistics(self, loss: GroupLoss) -> GroupStatistics:
        """The statistics of the last loss of `sound_loss`; of no group if it is not sound."""
        own = loss.statistics
        return own if self._sound is None else own.where(self._sound)

    def agree(self, total: Tensor) -> Tensor:
        """Agree with the other ranks at the end of a step's backward pass; every rank must call.

        Args:
            total: scalar, the loss of this rank's part of the step.

        Returns:
            The loss; 0 for a step that is skipped.

        Raises:
            NonFiniteError: on every rank, if log-probs of any are not finite.
            DataError: as `sound_loss`.
        """
        self._faults.look(self._objective)
        number = 0 if self.stop_requests is None else self.stop_requests.number
        found = largest_of_ranks([number, bool(self._faults.groups)], self.args.device)
        self._stopped_by = found[0]
        self._skips = bool(found[1])
        if not self._skips:
            return self._filtered(total)
        self._refuse_or_skip("log-probs that are not finite", self._faults.groups, named=True)
        self._lost_steps += 1
        return torch.zeros_like(total)

    def _filtered(self, total: Tensor) -> Tensor:
        """On a GPU, what transformers does with a loss that is not finite, on the device.

        With logging_nan_inf_filter it logs the mean of the losses before in place of such a loss,
        and reads each loss on the host for that, twice a step.
        """
        if total.device.type == "cpu" or not self.args.logging_nan_inf_filter:
            return total
        self._filters, self.args.logging_nan_inf_filter = True, False
        before = getattr(self, "_tr_loss", None)
        if before is None:
            return torch.where(torch.isfinite(total), total, 0.0)
        n_steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(torch.isfinite(total), total, before.to(total) / n_steps)

    def _restore_filter(self) -> None:
        if self._filters is not None:
            self.args.logging_nan_inf_filter, self._filters = self._filters, None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As transformers; a step whose gradient is not finite ends the run or is skipped."""
        self._restore_filter()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if not self._skips and not norm_is_finite(norm, scaler):
            groups = [] if self._share is None else self._share.groups
            self._refuse_or_skip("a gradient that is not finite", groups, named=False)
            self._skips = True
        if self._skips and not (scaler is not None and scaler.is_enabled()):
            model.zero_grad()  # no optimizer updates weights without gradient, nor decays them
        return norm

    def _refuse_or_skip(self, what: str, own: Sequence[Group], *, named: bool) -> None:
        """Raise NonFiniteError, or note that this step is skipped; every rank must call this."""
        found = self._named(self.state.global_step + 1, what, own, named=named)
        skipped = skipped_steps(self.state)
        most = self.args.max_nonfinite_skips
        if self.args.on_nonfinite != "skip":
            raise self._error(found)
        if len(skipped) >= most:
            raise self._error(
                found, f", after {len(skipped):,} skipped steps (max_nonfinite_skips)"
            )
        add_skipped(self.state, found.step)
        if self.is_world_process_zero():
            self._record_skip(found)
            logger.warning(
                "%s: the step is skipped (%d of at most %d)", found, len(skipped) + 1, most
            )

    def _record_skip(self, found: NonFinite) -> None:
        self.record.event(
            "skipped",
            at=found.step,
            what=found.what,
            groups=list(found.groups),
            samplers=list(found.samplers),
        )

    def _named(self, step: int, what: str, own: Sequence[Group], *, named: bool) -> NonFinite:
        """What is not finite, with the groups of all ranks."""
        parts = gather_results(lambda: ids_and_samplers(own))
        ids = tuple(name for names, _ in parts for name in names)
        samplers = tuple(sorted({name for _, names in parts for name in names}))
        return NonFinite(step, what, ids, samplers, all_groups=not named)

    def _error(self, found: NonFinite, more: str = "", *, updated: bool = False) -> Exception:
        """The error that ends the run; `updated`: the step has changed the weights already."""
        if self.is_world_process_zero():
            self.record.event(
                "nonfinite", at=found.step, what=found.what, groups=list(found.groups)
            )
        checkpoint = broadcast_from_rank0(self._newest_checkpoint)
        can_skip = not updated and self.args.on_nonfinite != "skip"
        return found.error(checkpoint, more, can_skip=can_skip)

    def _newest_checkpoint(self) -> Path | None:
        sealed = [own for own in checkpoint_folders(Path(self.args.output_dir)) if is_sealed(own)]
        return sealed[-1] if sealed else None

    # ---- between steps ----

    def check_policy(self) -> None:
        """Check weights, and log-probs and gradient of the first micro-batch of the last step;
        every rank must call this.

        Weights that are far too large are finite, and only their gradient may tell. A second call
        after the same step does nothing.

        Raises:
            NonFiniteError: on every rank, some are not finite. Nothing of this step is saved.
        """
        step = self.state.global_step
        if self._share is None or self._checked_step == step:
            return
        sound = weights_are_finite(self.model)
        self._faults = StepFaults()
        # DeepSpeed would update the weights in a backward pass.
        gradient = True if self.is_deepspeed_enabled else self._gradient_is_finite()
        found = [not bool(sound), bool(self._faults.groups), not gradient]
        weights, logprobs, gradients = largest_of_ranks(found, self.args.device)
        if logprobs:
            what = "log-probs that are not finite after the update"
            raise self._error(
                self._named(step, what, self._faults.groups, named=True), updated=True
            )
        if weights or gradients:
            what = f"{'weights' if weights else 'a gradient'} not finite after the update"
            raise self._error(
                self._named(step, what, self._share.groups, named=False), updated=True
            )
        self._checked_step = step

    def _gradient_is_finite(self) -> bool:
        """Whether this rank's part of a micro-batch's gradient is; notes unsound log-probs."""
        assert self._share is not None
        groups, n_forwards = self._share.micro_batches[0]

        def objective(logprobs_R: Tensor) -> Tensor:
            loss = self.sound_loss(self._objective, logprobs_R, groups)
            return logprobs_R.sum() if loss is None else loss.group_losses.sum()

        quiet = replace(self.engine, on_entropy=None)
        device = self.args.device
        self.model.train()
        # With dropout, a run that saves once more would otherwise have other random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            quiet.accumulate(
                self.model, groups, objective, torch.Tensor.backward, n_forwards=n_forwards
            )
        grads = [own.grad for own in self.model.parameters() if own.grad is not None]
        finite = bool(all_finite(grads))
        self._faults.look(self._objective)
        self.model.zero_grad()
        return finite

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As transformers, once the policy is known to be finite; ends a run that is to stop."""
        control = self.control
        stops = self._stopped_by and self.state.global_step < self.state.max_steps
        if stops:
            # It may take longer than what is left; the run that resumes makes up for it.
            set_evaluation_due(self.state, control.should_evaluate)
            control.should_save, control.should_evaluate = self.saves_when_stopped, False
        if control.should_save or control.should_evaluate:
            self.check_policy()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stops:
            self._stop()

    def _evaluate_late(self) -> None:
        """Evaluate as the run would have done at the step at which a signal stopped it."""
        set_evaluation_due(self.state, due=False)
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics=metrics, trial=None):
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if is_sealed(folder):
                self.state.best_model_checkpoint = str(folder)

    def _stop(self) -> NoReturn:
        """End the run, whose checkpoint of this step is complete, on all ranks."""
        newest = broadcast_from_rank0(self._newest_checkpoint)
        raise RunStopped(self._stopped_by, self.state.global_step, newest)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers; not in the time that is left after a signal."""
        if not self._stopped_by:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers, once the policy is known to be finite."""
        self.check_policy()
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers; the loss is the mean over the steps that have one."""
        if "loss" in logs:
            lost, self._lost_steps = self._lost_steps, 0
            n_steps = self.state.global_step - (self._logged_step or 0)
            if lost:
                done = n_steps - lost
                logs = {**logs, "loss": logs["loss"] * n_steps / done if done else float("nan")}
            self._logged_step = self.state.global_step
            n_skipped = len(skipped_steps(self.state))
            if n_skipped:
                logs = {**logs, "skipped_steps": n_skipped}
        super().log(logs, start_time)
