"""What is not finite in a step: log-probs, the norm of the gradient, weights; and which groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gvpo_offline.errors import ConfigError, NonFiniteError
from gvpo_offline.group import Group

if TYPE_CHECKING:
    from gvpo_offline.train.settings import GVPOSettings

# Name under which transformers' state, which every checkpoint holds, has what is not its own.
STATE_KEY = "gvpo_offline"
_SHOWN = 5
# fp16 scales the loss so that its gradient overflows now and then, and lowers the scale each time.
# From here on the scale is not the cause.
_LOWEST_SCALE = 1.0


@dataclass(frozen=True)
class NonFinite:
    """A step with a value that is not finite.

    Attributes:
        step: its number, from 1.
        what: what is not finite, such as "log-probs".
        groups: ids of the groups with such values; or of all groups of the step where a single one
            cannot be told.
        samplers: names of their samplers.
        all_groups: whether `groups` are all groups of the step.
    """

    step: int
    what: str
    groups: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    all_groups: bool = True

    def __str__(self) -> str:
        named = ", ".join(map(repr, self.groups[:_SHOWN]))
        more = len(self.groups) - _SHOWN
        named += f" and {more:,} more" if more > 0 else ""
        which = "of the groups" if self.all_groups else "in the groups"
        names = ", ".join(self.samplers[:_SHOWN])
        names += " …" if len(self.samplers) > _SHOWN else ""
        by = f" (samplers {names})" if names else ""
        return f"{self.what} at step {self.step:,}, {which} {named}{by}"

    def error(
        self, checkpoint: Path | None, more: str = "", *, can_skip: bool = True
    ) -> NonFiniteError:
        """The error that ends the run.

        Args:
            checkpoint: the newest complete checkpoint.
            more: what else the run did.
            can_skip: whether on_nonfinite: skip would have left the step out.
        """
        start = (
            "start again"
            if checkpoint is None
            else f"nothing was saved since {checkpoint}, which is complete: start a new run from "
            "its weights"
        )
        return NonFiniteError(
            "log-probs, gradients and weights stay finite in training",
            received=f"{self}{more}",
            remedy=f"{start} with a lower learning_rate, or look at these groups (gvpo-offline "
            f"show){'; on_nonfinite: skip leaves such steps out' if can_skip else ''}",
            group=self.groups[0] if self.groups and not self.all_groups else None,
        )


@dataclass
class StepFaults:
    """The groups of this rank whose log-probs were not finite in the present step."""

    groups: list[Group] = field(default_factory=list)
    _waiting: list[tuple[Sequence[Group], Tensor, Tensor]] = field(default_factory=list)

    def wait(self, groups: Sequence[Group], logprobs_R: Tensor, sound: Sequence[Tensor]) -> Tensor:
        """Keep the checks of a micro-batch for `look`; without waiting for the device.

        Returns:
            Scalar bool on the device: whether all checks hold.
        """
        whole = torch.stack(list(sound)).all()
        self._waiting.append((groups, logprobs_R.detach(), whole))
        return whole

    def look(self, recheck: Callable[[Tensor, Sequence[Group]], object]) -> None:
        """Read the checks that were kept, all at once, and note the groups at fault.

        Args:
            recheck: raises DataError for a micro-batch whose groups' own values are at fault.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        found: list[bool] = torch.stack([whole for _, _, whole in waiting]).tolist()
        for (groups, logprobs_R, _), sound in zip(waiting, found, strict=True):
            before = len(self.groups)
            if not sound:
                self.note(groups, logprobs_R)
            if not sound and len(self.groups) == before:
                recheck(logprobs_R, groups)

    def note(self, groups: Sequence[Group], logprobs_R: Tensor) -> None:
        """Add those of the groups that have a log-prob that is not finite.

        Args:
            groups: of a micro-batch.
            logprobs_R: (R,) log-probs of their responses, nats.
        """
        finite_R = torch.isfinite(logprobs_R.detach()).tolist()
        begin = 0
        for group in groups:
            end = begin + group.group_size
            if not all(finite_R[begin:end]):
                self.groups.append(group)
            begin = end


def ids_and_samplers(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """The ids of groups, and the names of their samplers, sorted."""
    return [own.group_id for own in groups], sorted({n for own in groups for n in own.samplers})


def norm_is_finite(norm: Any, scaler: Any = None) -> bool:
    """Whether the norm of a gradient is finite, or not so because of the scale of fp16.

    Args:
        norm: a number or a tensor, which may be sharded; the same on all ranks.
        scaler: torch's GradScaler, which itself skips an update that overflows; None: none.
    """
    if norm is None:
        return True
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if math.isfinite(float(whole)):
        return True
    scales = scaler is not None and scaler.is_enabled()
    return bool(scales and scaler.get_scale() > _LOWEST_SCALE)


def weights_are_finite(model: nn.Module) -> Tensor:
    """Whether this rank's part of all weights is finite: scalar bool, on the device."""
    return all_finite([own.detach() for own in model.parameters()])


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether this rank's part of some tensors is finite: scalar bool, on the device."""
    finite = [torch.isfinite(_local(own)).all() for own in tensors]
    if not finite:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([own.to(finite[0].device) for own in finite]).all()


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def largest_of_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest of some numbers over all ranks, each of its own; every rank must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found


def skipped_steps(state: Any) -> list[int]:
    """The steps that a run has skipped so far, by transformers' state of it."""
    return [int(step) for step in _own(state).get("skipped", ())]


def add_skipped(state: Any, step: int) -> None:
    """Note a skipped step in transformers' state, which every checkpoint holds."""
    _set(state, skipped=[*skipped_steps(state), step])


def is_evaluation_due(state: Any) -> bool:
    """Whether a signal stopped the run at a step at which it was to evaluate."""
    return bool(_own(state).get("evaluation_due"))


def set_evaluation_due(state: Any, due: bool) -> None:
    """Note in transformers' state whether an evaluation is to be made up for."""
    if due or is_evaluation_due(state):
        _set(state, evaluation_due=bool(due))


def _own(state: Any) -> Mapping[str, Any]:
    held: Mapping[str, Any] = getattr(state, "stateful_callbacks", None) or {}
    own: Mapping[str, Any] = held.get(STATE_KEY, {})
    return own


def _set(state: Any, **values: Any) -> None:
    # transformers expects args and attributes of each callback.
    own = {"args": {}, "attributes": {}, **_own(state), **values}
    state.stateful_callbacks = {**(state.stateful_callbacks or {}), STATE_KEY: own}


def check_can_skip(settings: GVPOSettings, *, deepspeed: bool) -> None:
    """Raise ConfigError for skipping with DeepSpeed, which updates within the backward pass."""
    if settings.on_nonfinite == "skip" and deepspeed:
        raise ConfigError(
            "on_nonfinite: skip leaves an update out once the gradient is known",
            received="DeepSpeed, which updates the weights as part of the backward pass",
            remedy="set on_nonfinite: stop, or train with DDP or FSDP2",
        )
