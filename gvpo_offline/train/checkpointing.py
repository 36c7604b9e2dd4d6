"""A Trainer that writes sealed checkpoints and resumes from sealed checkpoints of the same run.

`checkpoint` defines the files of a sealed checkpoint; this module writes and reads them on all
ranks.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gvpo_offline.collectives import (
    broadcast_from_rank0,
    gather_results,
    local_rank_slice,
    raise_together,
)
from gvpo_offline.compute.model import float64_device
from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.train.checkpoint import (
    begin_checkpoint,
    check_identity,
    check_output_dir,
    find_checkpoint,
    is_sealed,
    read_losses,
    read_sharding_state,
    rotate_sealed,
    save_errors,
    seal_checkpoint,
)
from gvpo_offline.train.checkpoint_files import damaged_error, faults
from gvpo_offline.train.loss_sum import LossSum, Sums
from gvpo_offline.train.resharding import check_sharding_state, sharding_state
from gvpo_offline.train.schedule import ScheduledTrainer

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _changed(settings: Any, **values: Any) -> Iterator[None]:
    """A context in which an object has other values of some attributes."""
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def verify_contents(folder: Path, remedy: str = "") -> None:
    """Check the hashes of a complete checkpoint's files; every rank must call this.

    The ranks of each machine read the files together, each in several threads.

    Args:
        folder: the folder of the checkpoint.
        remedy: what the error says can be done; default: how to resume from another checkpoint.

    Raises:
        ResumeError: files are missing, altered or added.
    """
    started = time.perf_counter()
    found = {
        name: fault
        for part in gather_results(lambda: faults(folder, part=local_rank_slice()))
        for name, fault in part.items()
    }
    if found:
        raise broadcast_from_rank0(lambda: damaged_error(folder, found, remedy))
    logger.info("%s is intact (%.1f s)", folder, time.perf_counter() - started)


class CheckpointingTrainer(ScheduledTrainer):
    """A Trainer that seals its checkpoints and resumes from sealed ones of the same run."""

    _losses: LossSum | None = None
    _train_loss: float | None = None  # while a run ends

    def identity(self) -> dict[str, dict[str, Any]]:
        """The settings that a resumed run must share: data, objective, model, optimization."""
        raise NotImplementedError

    def identity_defaults(self) -> dict[str, dict[str, Any]]:
        """Values of settings that are missing in `identity` or in a checkpoint, by part."""
        return {}

    def checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to resume from, or None; errors as `GVPOTrainer.train`."""
        output_dir = Path(self.args.output_dir)
        checkpoint = find_checkpoint(output_dir, wanted) if wanted else None
        if checkpoint is None:
            check_output_dir(output_dir)
            return None
        check_identity(checkpoint, self.identity(), self.identity_defaults())
        check_sharding_state(
            checkpoint, read_sharding_state(checkpoint), sharding_state(self.accelerator)
        )
        return checkpoint

    def begin_from(self, wanted: str | bool | None) -> Path | None:
        """`checkpoint_to_resume` on all ranks, with the contents of its files verified."""
        checkpoint = broadcast_from_rank0(lambda: self.checkpoint_to_resume(wanted))
        if checkpoint is not None:
            verify_contents(checkpoint)
        saved = broadcast_from_rank0(lambda: read_losses(checkpoint) if checkpoint else None)
        args = self.args
        self._losses = LossSum(
            float64_device(args.device), saved, args.process_index, args.world_size
        )
        return checkpoint

    def add_loss(self, loss: Tensor) -> None:
        """Add this rank's part of a step's loss to the mean over all steps of the run."""
        if self._losses is not None:
            self._losses.add(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers; but `train_loss` is over all steps of the run, also before a resume."""
        if self._train_loss is not None and "train_loss" in logs:
            logs["train_loss"] = self._train_loss
        super().log(logs, start_time)

    def is_of_run(self, folder: Path) -> bool:
        """Whether a complete checkpoint has the identity of this run."""
        try:
            check_identity(folder, self.identity(), self.identity_defaults())
        except ResumeError:
            return False
        return True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as transformers does, then seal; then upload, and remove older checkpoints."""
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        saving = save_errors(folder) if self.args.should_save else contextlib.nullcontext()
        with _changed(self.args, save_total_limit=None), saving:
            raise_together(lambda: begin_checkpoint(folder) if self.args.should_save else None)
            raise_together(lambda: super(CheckpointingTrainer, self)._save_checkpoint(model, trial))
            losses = [] if self._losses is None else self._losses.gathered()
            raise_together(lambda: self._seal(folder, losses) if self.args.should_save else None)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [folder.name, *([Path(best).name] if best else [])]
            rotate_sealed(output_dir, self.args.save_total_limit, keep)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers, after the seal: resuming from an uploaded checkpoint needs it too."""
        if is_sealed(Path(checkpoint_folder)):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers, which with save_total_limit 1 keeps the best checkpoint alone.

        transformers would also remove folders that only begin with the name of a checkpoint.
        """
        mean = 0.0 if self._losses is None else LossSum.mean(self._losses.gathered())
        with _changed(self.args, save_total_limit=None), _changed(self, _train_loss=mean):
            output = super()._finalize_training(*args, **kwargs)
        output = output._replace(training_loss=mean)
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best:
            rotate_sealed(Path(self.args.output_dir), 1, [Path(best).name])
        return output

    def _load_best_model(self) -> None:
        """As transformers, once the files of the best checkpoint are known to be intact."""
        best = Path(self.state.best_model_checkpoint or "")
        if all(gather_results(lambda: is_sealed(best))):
            verify_contents(
                best,
                "restore it from a copy; or set load_best_model_at_end: false, and resume from the "
                "newest checkpoint, which holds the weights after the last step",
            )
        super()._load_best_model()

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As transformers.

        Raises:
            ConfigError: the repository can be neither found nor made: no network, no permission.
        """
        raise_together(lambda: self._init_hf_repo(*args, **kwargs))

    def _init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the hub's client, of its HTTP library, or of the system
            raise ConfigError(
                "push_to_hub makes a repository in the hub before training starts",
                received=f"{type(error).__name__}: {' '.join(str(error).split())}",
                remedy="log in with `hf auth login`, check hub_model_id and the network, or leave "
                "push_to_hub out and run `hf upload` on output_dir later",
            ) from error

    def _seal(self, folder: Path, losses: Sums) -> None:
        seal_checkpoint(
            folder,
            self.state.global_step,
            self.identity(),
            sharding=sharding_state(self.accelerator),
            resumable=not self.args.save_only_model,
            lines=self.record.line_counts(),
            loss=LossSum.content(losses),
        )
