"""What a run counts beside its metrics: groups of a step, floating-point operations, tokens."""

from __future__ import annotations

from typing import Any

import torch

from gvpo_offline.compute.engine import Engine
from gvpo_offline.stream.plan import shape_of
from gvpo_offline.stream.steps import StepShare
from gvpo_offline.train.objective import reduced_sum
from gvpo_offline.train.record.recording import RecordedTrainer


class CountingTrainer(RecordedTrainer):
    """A Trainer that counts in groups and in the tokens of their layout."""

    engine: Engine

    def get_total_train_batch_size(self, args: Any) -> int:
        """The batch size in groups, which transformers prints in its summary."""
        return self.args.groups_per_step

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x laid-out tokens, the estimate that transformers uses."""
        share: StepShare = inputs["share"]
        layout = self.engine.cost.layout
        tokens = sum(shape_of(group).tokens(layout) for group in share.groups)
        return 6 * tokens * int(sum(p.numel() for p in self.model.parameters()))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        own = torch.tensor(inputs["share"].n_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(reduced_sum(self.accelerator, own))
