"""`gvpo-offline plan`: memory and time of training, before any GPU is rented."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.plan.settings import PlanSettings
from gvpo_offline.store.location import RemoteSettings

if TYPE_CHECKING:
    from gvpo_offline.plan.forecast import Forecast, Plan

_SHARDING = {"none": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def _run_plan(values: dict[str, Any]) -> None:
    from gvpo_offline.plan.config_file import model_shape
    from gvpo_offline.plan.devices import find_device
    from gvpo_offline.plan.forecast import make_plan
    from gvpo_offline.plan.workload import sampled_lengths
    from gvpo_offline.store.adopt import adopt_parquet
    from gvpo_offline.store.dataset import open_dataset
    from gvpo_offline.store.location import is_url, local_path

    values["remote"] = RemoteSettings(**values["remote"])
    settings = filled(PlanSettings, values)
    find_device(settings.gpu)
    path = settings.dataset
    if not is_url(path) and local_path(path).is_file():
        dataset = adopt_parquet([local_path(path)], checked=False)
    else:
        dataset = open_dataset(
            path, version=settings.dataset_version, join=(), remote=settings.remote
        )
    shape = model_shape(settings.model_name_or_path, settings.model_revision)
    groups = sampled_lengths(dataset, settings.max_groups, settings.seed)
    plan = make_plan(settings, shape, groups, dataset.n_groups)
    if settings.format == "json":
        say(json.dumps(as_dict(plan)))
    else:
        say(*lines(plan))


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as values for JSON."""
    settings, model = plan.settings, plan.model
    epochs = settings.num_train_epochs
    return {
        "model": settings.model_name_or_path,
        "model_type": model.model_type,
        "known_model_type": model.known,
        "parameters": model.parameters,
        "dataset": settings.dataset,
        "groups": plan.n_groups,
        "sampled_groups": plan.sampled,
        "gpu": settings.gpu,
        "gpus": settings.gpus,
        "peak_share": settings.peak_share,
        "steps_per_epoch": plan.steps_per_epoch,
        "ways": [
            {
                **way.as_dict(),
                "hours_per_epoch": way.seconds.total * plan.steps_per_epoch / 3600,
                "hours": way.seconds.total * plan.steps_per_epoch * epochs / 3600,
            }
            for way in plan.ways
        ],
        "best": None if plan.best is None else plan.ways.index(plan.best),
        "next": next_command(plan),
    }


def lines(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    from gvpo_offline.plan.cost import USABLE
    from gvpo_offline.plan.forecast import duration

    settings, model, first = plan.settings, plan.model, plan.ways[0]
    known = "" if model.known else ", a family that is not known and is taken as a Llama"
    of = "" if plan.sampled >= plan.n_groups else f", by the lengths of {plan.sampled:,} of them"
    per_epoch = plan.steps_per_epoch
    steps = f"{per_epoch:,.0f}" if per_epoch >= 10 else f"{per_epoch:.3g}"
    found = [
        (
            f"{settings.model_name_or_path}: {model.parameters / 1e9:.3g} billion weights in "
            f"{len(model.layers)} layers ({model.model_type}{known})"
        ),
        (
            f"{settings.dataset}: {plan.n_groups:,} groups to train on{of}; a step of "
            f"{settings.groups_per_step} has {first.steps.mean_tokens:,.0f} tokens, an epoch "
            f"{steps} steps"
        ),
        (
            f"{settings.gpus} x {settings.gpu} with {first.device.memory / 1e9:.3g} GB, of which "
            f"{USABLE:.0%} are used; times at {settings.peak_share:g} of the peak of "
            f"{first.device.peak(narrow=first.how.narrow) / 1e12:,.0f} TFLOP/s"
        ),
        "Computed from shapes; not a measurement.",
        "",
    ]
    head = ("training", "on", "activations", "tokens a pass", "GB", "fits", "a step", "an epoch")
    rows = [head, *(_row(way, plan.steps_per_epoch) for way in plan.ways)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    found += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    found.append("")
    best = plan.best
    if best is None:
        least = min(plan.ways, key=lambda way: way.memory.total)
        return [
            *found,
            (
                f"nothing fits: the least is {least.memory.total / 1e9:.3g} GB a GPU. Take more or "
                "larger GPUs (--gpus, --gpu), --dtype bfloat16, --load_in_4bit true with an "
                "adapter, or leave out the longest responses"
            ),
        ]
    epochs = settings.num_train_epochs
    total = duration(best.seconds.total * plan.steps_per_epoch * epochs)
    return [
        *found,
        f"this run: {best.line(settings.peak_share)}; {total} for {epochs:g} epochs",
        f"next: {next_command(plan)}",
    ]


def _row(way: Forecast, steps: float) -> tuple[str, ...]:
    from gvpo_offline.plan.forecast import duration

    return (
        f"LoRA, rank {way.how.lora_r}" if way.how.lora_r else "all weights",
        _SHARDING[way.how.sharding],
        "again" if way.how.checkpointing else "kept",
        f"{way.max_tokens:,}",
        f"{way.memory.total / 1e9:.3g}",
        "yes" if way.fits else "no",
        duration(way.seconds.total),
        duration(way.seconds.total * steps),
    )


def next_command(plan: Plan) -> str | None:
    """The training of the best way, quoted for a shell; None if nothing fits."""
    best, settings = plan.best, plan.settings
    if best is None:
        return None
    start = ["gvpo-offline", "train"]
    if settings.gpus > 1:
        start = ["torchrun", "--nproc_per_node", str(min(settings.gpus, 8))]
        if settings.gpus > 8:
            start += ["--nnodes", str(-(-settings.gpus // 8))]
        start += ["-m", "gvpo_offline.cli", "train"]
    flags: dict[str, str | None] = {
        "dataset": settings.dataset,
        "model_name_or_path": settings.model_name_or_path,
        "model_revision": settings.model_revision,
        "output_dir": "RUN",
        "bf16": "true" if settings.bf16 else None,
        "dtype": settings.dtype if settings.dtype != "float32" else None,
        "use_peft": "true" if best.how.lora_r else None,
        "lora_r": str(best.how.lora_r) if best.how.lora_r not in (0, 16) else None,
        "lora_target_modules": "all-linear" if best.how.lora_r else None,
        "load_in_4bit": "true" if best.how.quantised else None,
        "activation_checkpointing": "true" if best.how.checkpointing else None,
        "fsdp": "true" if best.how.sharding == "fsdp2" else None,
        "deepspeed": "ZERO3.json" if best.how.sharding == "zero3" else None,
        "optim": settings.optim if settings.optim != PlanSettings.optim else None,
    }
    flags |= {
        name: str(value)
        for name, value, default in (
            ("max_tokens_per_micro_batch", best.max_tokens, 16_384),
            ("groups_per_step", settings.groups_per_step, 32),
            ("num_train_epochs", settings.num_train_epochs, 3.0),
            ("eval_fraction", settings.eval_fraction, 0.0),
            ("kept_logits_mb", settings.kept_logits_mb, 1024),
        )
        if value != default
    }
    words = [word for name, value in flags.items() if value for word in (f"--{name}", value)]
    return shlex.join([*start, *words])


COMMANDS: dict[str, Command] = {
    "plan": Command(
        "Say whether training fits into GPUs, in which ways, and how long it takes.",
        _run_plan,
        (PlanSettings,),
        "Example: gvpo-offline plan --dataset data --model_name_or_path MODEL --gpus 8 --gpu h100. "
        "More: docs/howto/plan.md",
        positional="dataset",
    ),
}
