"""GVPO without the Trainer: the whole method in one training loop.

    python examples/loop.py                                      # makes a tiny dataset and model
    python examples/loop.py --dataset data --model MODEL --output_dir run

A dataset holds, for every response, token ids, a reward and the log-prob under the reference.
GVPO needs one number more: the response's log-prob under the policy that is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gvpo_offline as gvpo


def batch_loss(
    seq_logprobs: Tensor, groups: Sequence[gvpo.Group], beta: float, n_groups: int
) -> Tensor:
    """The groups' part of a step's loss, which is the mean over the step's `n_groups` groups.

    `seq_logprobs`: (N,) float64, nats, the policy's log-probs of all N responses, with a graph.
    """
    rewards = torch.from_numpy(np.concatenate([g.rewards for g in groups]))
    ref_logprobs = torch.from_numpy(np.concatenate([g.ref_seq_logprobs for g in groups]))
    sizes = torch.tensor([g.group_size for g in groups])
    group_index = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    result = gvpo.gvpo_loss(seq_logprobs, ref_logprobs, rewards, group_index, beta=beta)
    return result.group_losses.sum() / n_groups


def train(
    model: nn.Module,
    dataset: gvpo.GroupDataset,
    optimizer: torch.optim.Optimizer,
    *,
    beta: float = 0.1,
    groups_per_step: int = 8,
    num_epochs: float = 10,
    seed: int = 42,
) -> list[float]:
    """Train the model in place; returns the loss of each optimizer step."""
    gvpo.disable_dropout(model.train())
    engine = gvpo.prepare_engine(model, max_tokens=4096)  # tests how to compute log-probs
    steps = gvpo.training_steps(
        dataset, engine.cost, groups_per_step=groups_per_step, num_epochs=num_epochs, seed=seed
    )
    losses = []
    for number in range(len(steps)):
        step = steps[number]  # its groups, cut into micro-batches of at most 4096 tokens
        optimizer.zero_grad()
        loss = 0.0
        for micro_batch in step.micro_batches:
            groups = micro_batch.groups
            objective = partial(batch_loss, groups=groups, beta=beta, n_groups=step.n_groups)
            # Log-probs of all responses, the loss, and its gradient added to the weights' .grad.
            loss += engine.accumulate(model, groups, objective, Tensor.backward).item()
        optimizer.step()
        losses.append(loss)
        print(f"step {number:>3}  loss {loss:.5f}")
    return losses


def main() -> None:
    """Train on a dataset that exists, or on a tiny one that is made first."""
    parser = argparse.ArgumentParser(description="GVPO in a hand-written training loop.")
    parser.add_argument("--dataset", help="folder, already scored by `gvpo-offline reference`")
    parser.add_argument("--model", help="the policy: a folder or a hub name")
    parser.add_argument("--output_dir", default="runs/loop")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.dataset is None:
        from tiny import make_tiny

        args.dataset, args.model = make_tiny(Path(args.output_dir))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    train(model, gvpo.open_dataset(args.dataset), optimizer)
    model.save_pretrained(Path(args.output_dir) / "policy")


if __name__ == "__main__":
    main()
