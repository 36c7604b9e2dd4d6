"""A Trainer that writes sealed checkpoints and resumes from sealed checkpoints of the same run.

`checkpoint` defines the files of a sealed checkpoint; this module writes and reads them on all
ranks.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import rotate_checkpoints

from gvpo_offline.collectives import raise_together
from gvpo_offline.train.checkpoint import (
    begin,
    check_identity,
    find_checkpoint,
    read_sharding_state,
    refuse_leftovers,
    save_errors,
    seal,
)
from gvpo_offline.train.distributed import ShardedTrainer
from gvpo_offline.train.resharding import check_sharding_state, sharding_state


class CheckpointingTrainer(ShardedTrainer):
    """A Trainer that seals its checkpoints and resumes from sealed ones of the same run."""

    def identity(self) -> dict[str, dict[str, Any]]:
        """The settings that a resumed run must share: data, objective, model, optimization."""
        raise NotImplementedError

    def identity_defaults(self) -> dict[str, dict[str, Any]]:
        """What stands for a setting that `identity` or a checkpoint does not name, by part."""
        return {}

    def found_checkpoint(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to resume from, or None; errors as `GVPOTrainer.train`."""
        output_dir = Path(self.args.output_dir)
        checkpoint = find_checkpoint(output_dir, wanted) if wanted else None
        if checkpoint is None:
            refuse_leftovers(output_dir)
            return None
        check_identity(checkpoint, self.identity(), self.identity_defaults())
        check_sharding_state(
            checkpoint, read_sharding_state(checkpoint), sharding_state(self.accelerator)
        )
        return checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as transformers does, then seal; older checkpoints are removed after that."""
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with save_errors(folder) if self.args.should_save else contextlib.nullcontext():
                raise_together(lambda: begin(folder) if self.args.should_save else None)
                raise_together(
                    lambda: super(CheckpointingTrainer, self)._save_checkpoint(model, trial)
                )
                raise_together(lambda: self._seal(folder) if self.args.should_save else None)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _seal(self, folder: Path) -> None:
        seal(
            folder,
            self.state.global_step,
            self.identity(),
            taken=sharding_state(self.accelerator),
            resumable=not self.args.save_only_model,
        )
