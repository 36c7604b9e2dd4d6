"""A Trainer that writes a model card with each model that it saves."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.trainer_pt_utils import AcceleratorConfig

from gvpo_offline.compute.model import dtype_of
from gvpo_offline.errors import labelled
from gvpo_offline.hub.markdown import code
from gvpo_offline.identity import defaults_of
from gvpo_offline.info.text import sampler_text
from gvpo_offline.secret_settings import is_secret, public
from gvpo_offline.store.coverage import coverage_of
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.model_card import CardDataset, CardFacts, read_card, write_card
from gvpo_offline.train.sampled import SampledTrainer
from gvpo_offline.train.saving import without_secrets
from gvpo_offline.train.serving import name_rotary_base, portable_tokenizer, ready_to_serve
from gvpo_offline.train.settings import GVPOSettings
from gvpo_offline.version import __version__

if TYPE_CHECKING:
    from gvpo_offline.reference.checks import PolicyFacts
    from gvpo_offline.train.data import TrainingData

_EVAL = "eval_"
# transformers sets them by the machine.
_DERIVED = {"dataloader_pin_memory", "do_eval", "local_rank"}


class CardedTrainer(SampledTrainer):
    """A Trainer whose saved models have a card that says how they were trained.

    Attributes:
        run_settings: settings of model, data and adapter, where `gvpo-offline train` runs it.
    """

    data: TrainingData
    policy: PolicyFacts
    run_settings: Mapping[str, Any] | None = None
    _prepare: functools.partial[TrainingData]
    _loaded_best = False

    def card_facts(self, **data: Any) -> CardFacts:
        """What the card says now.

        Args:
            data: further front matter: the arguments of `create_model_card`.
        """
        adapters: Mapping[str, Any] = getattr(self.model, "peft_config", {})
        name = data.pop("model_name", None) or Path(self.args.output_dir).resolve().name
        base = data.pop("finetuned_from", None) or _base_name(self.model, adapters)
        return CardFacts(
            name=str(self.args.hub_model_id or name),
            base=base,
            adapter=", ".join(str(each.peft_type.value) for each in adapters.values()),
            done=self._done(),
            datasets=[self._dataset(view) for view in self.data.views],
            evaluations=_evaluations(self.state.log_history),
            held_out=list(self.data.held_out),
            saved_step=self._saved_step(),
            started_as_reference=self._started_as_reference,
            settings={
                **(self.run_settings or {}),
                **_own_settings(self.args, self._given_max_steps),
            },
            from_command=self.run_settings is not None,
            data=_front_matter(data),
        )

    def _done(self) -> dict[str, str]:
        args, state, reference = self.args, self.state, self.data.reference
        own, usual = args.settings(), defaults_of(GVPOSettings)
        left_out = ", ".join(args.imitation_without)
        without = f", without samplers {code(left_out)}" if left_out else ""
        imitated = f"{args.imitation:g} of {code(args.imitation_of)}{without}"
        same = ", the policy before training" if self._started_as_reference else ""
        optional = ("anchor", "response_weights", "link", "reference_sampler")
        done = f"{state.global_step:,} of {state.max_steps:,} steps"
        epochs = f"{state.epoch or 0:.3g} epochs"
        autocast = self.policy.autocast_dtype or "none"
        versions = {
            "gvpo_offline": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        }
        return {
            "objective": code(args.loss_type),
            "β": f"{args.beta:g}",
            "imitation": imitated if args.imitation else "none",
            **{name: code(own[name]) for name in optional if own[name] != usual[name]},
            "reference": f"{code(reference.described)} ({code(reference.fingerprint[:12])}){same}",
            "length": f"{done} of {args.groups_per_step} groups each, {epochs}",
            "saved weights": f"those of step {self._saved_step()}",
            "learning rate": f"{args.learning_rate:g}, {code(args.lr_scheduler_type.value)}",
            "weights": f"{code(dtype_of(self.model))}, autocast {autocast}",
            "seed": f"{args.seed}",
            "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }

    @property
    def _given_max_steps(self) -> int:
        given: int = self._prepare.args[2].max_steps  # the settings with which it reads the data
        return given

    @property
    def _started_as_reference(self) -> bool:
        return self.policy.weights_sha256 == self.data.reference.weights_sha256

    def _load_best_model(self) -> None:
        """As transformers; the card says which step's weights these are."""
        super()._load_best_model()
        self._loaded_best = True

    def _saved_step(self) -> int:
        """The step whose weights the model has."""
        best = self.state.best_model_checkpoint
        number = Path(best).name.rpartition("-")[2] if self._loaded_best and best else ""
        return int(number) if number.isdigit() else self.state.global_step

    def _dataset(self, view: DatasetView) -> CardDataset:
        manifest = view.dataset.manifest
        names = [own.name for own in self.data.views]
        held = [each.n_groups for name, each in self.data.held_out.items() if name == view.name]
        if self.data.separate:
            held = [sum(each.n_groups for each in self.data.held_out.values())] * (
                view.name == names[0]
            )
        notes = {f"selection {n}": note for n, note in enumerate(view.notes, 1)}
        reference = view.dataset.reference
        covered = None if reference is None else coverage_of(reference, manifest)
        if covered is not None:
            notes["reference covers"] = covered.text
        return CardDataset(
            path=labelled(view.dataset.root),
            version=manifest.version,
            fingerprint=view.dataset.fingerprint,
            trained=view.n_groups,
            held_out=sum(held),
            samplers=[sampler_text(*item) for item in manifest.samplers.items()],
            rewards=[
                f"{own.family.name}@{own.family.version}"
                + ("" if own.weight == 1.0 else f" times {own.weight:g}")
                for own in view.dataset.rewards
            ],
            selection=notes,
        )

    # ---- every place that writes README.md ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers, ready to be served; then the card, in place of PEFT's."""
        folder = Path(output_dir or self.args.output_dir)
        before = read_card(folder) if self.args.should_save else None
        with ready_to_serve(self.model, self.processing_class), without_secrets(self.args):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            name_rotary_base(folder)
            write_card(folder, self.card_facts(), before)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card to `output_dir`; `push_to_hub` calls this.

        Args:
            args, kwargs: of transformers' Trainer: language, license, tags, model_name …
        """
        if self.is_world_process_zero():
            names = ("language", "license", "tags", "model_name", "finetuned_from")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_card(folder, self.card_facts(**given), read_card(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers, with the card of now."""
        self.create_model_card()
        with portable_tokenizer(self.processing_class):  # which it saves again
            super()._push_from_checkpoint(checkpoint_folder)


def _base_name(model: Any, adapters: Mapping[str, Any]) -> str:
    names = [str(each.base_model_name_or_path or "") for each in adapters.values()]
    config = getattr(model, "config", None)
    return next(filter(None, [*names, str(getattr(config, "_name_or_path", "") or "")]), "")


def _evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of evaluations, metrics without their prefix; those of one step are one line."""
    found: dict[int, dict[str, Any]] = {}
    for line in history:
        own = {
            name.removeprefix(_EVAL): value
            for name, value in line.items()
            if name.startswith(_EVAL)
        }
        if own:
            step = int(line.get("step", 0))
            found.setdefault(step, {"step": step}).update(own)
    return [found[step] for step in sorted(found)]


def _own_settings(args: GVPOConfig, max_steps: int) -> dict[str, Any]:
    """The settings of the run that differ from their defaults, without secrets.

    Args:
        args: as the trainer has them.
        max_steps: as it was given; the trainer counts the steps of the epochs in its place.
    """
    defaults = defaults_of(GVPOConfig)
    chosen = {}
    for name, value in {**args.to_dict(), "max_steps": max_steps}.items():
        if name not in defaults or name in _DERIVED or is_secret(name):
            continue
        usual = getattr(defaults[name], "value", defaults[name])
        if name == "accelerator_config" and (
            _set(value).items() <= _set(AcceleratorConfig().to_dict()).items()
        ):
            continue
        # transformers writes an empty value where nothing was set.
        unset = usual in (None, "", "none") and not value
        plain = isinstance(value, str | int | float | bool | list | dict)
        if value != usual and plain and not unset:
            chosen[name] = public(value, name)
    return {"output_dir": args.output_dir, **chosen}


def _set(values: Any) -> dict[str, Any]:
    """Those of some settings that are set."""
    return {name: value for name, value in dict(values or {}).items() if value is not None}


def _front_matter(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create_model_card` as front matter."""
    names = {"dataset": "datasets", "dataset_tags": "datasets"}
    kept = ("language", "license", "tags", "datasets")
    renamed = {names.get(name, name): value for name, value in given.items() if value is not None}
    return {name: value for name, value in renamed.items() if name in kept}


def run_settings(*settings: Any) -> dict[str, Any]:
    """The settings of model, data and adapter that differ from their defaults, as plain data."""
    chosen: dict[str, Any] = {}
    for each in settings:
        plain = public(each.public() if hasattr(each, "public") else asdict(each))
        defaults = {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
            for name, value in defaults_of(type(each)).items()
        }
        chosen |= {
            name: value
            for name, value in plain.items()
            if name not in defaults or value != defaults[name]
        }
    return chosen
