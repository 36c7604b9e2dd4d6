"""The sampling stage as a whole: prompts, samplers one after the other, and the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.encode import load_encoder
from gvpo_offline.importing.folder import SAMPLING_STAGES
from gvpo_offline.importing.formats.shared.log_format import Log
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.sampling.dialect import DatasetTokenizer
from gvpo_offline.sampling.gather import SampledFormat, SampledRows
from gvpo_offline.sampling.log import SampleLog
from gvpo_offline.sampling.prompts import prepare_prompts
from gvpo_offline.sampling.samplers import open_sampler
from gvpo_offline.sampling.settings import BatchSettings, SampleConfig, recorded
from gvpo_offline.sampling.stage import Sampler, SampleStage
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_versions
from gvpo_offline.store.writer import claim_folder
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings

# Raise it whenever the same prompts and settings would give other responses than before.
_VERSION = 1
_CAUSES_SHOWN = 3
_NOT_RECORDED = ("output_dir", "show_progress", "samplers")


@dataclass(frozen=True)
class SampleResult:
    """What a run came to.

    Attributes:
        manifest: the dataset's, or None where responses are missing still.
        responses: how many there are, by sampler.
        gaps: how many are missing and why, by sampler.
        counts: prompts that were left out, by reason.
        requests: request files that were written, to be handed in.
        asked: whether every response was asked for, by whichever shard of the work.
    """

    manifest: Manifest | None
    responses: dict[str, int]
    gaps: dict[str, Counter[str]]
    counts: dict[str, int]
    requests: Sequence[Path] = ()
    asked: bool = True

    @property
    def n_gaps(self) -> int:
        """Responses that are missing."""
        return sum(causes.total() for causes in self.gaps.values())

    def lines(self) -> list[str]:
        """The result for people, one fact a line."""
        lines = [f"{n:,} prompts left out: {name}" for name, n in self.counts.items()]
        for name, n in self.responses.items():
            causes = self.gaps[name]
            lines.append(f"sampler {name}: {n:,} responses, {causes.total():,} missing")
            lines += [f"  {n:,}x {cause}" for cause, n in causes.most_common(_CAUSES_SHOWN)]
        lines += [f"to hand in: {path}" for path in self.requests]
        if self.manifest is not None:
            lines.append(f"dataset: {self.manifest.n_groups:,} groups")
        return lines


def run_sample(config: SampleConfig, engine: WorkerSettings | None = None) -> SampleResult:
    """Sample what is not sampled yet; make the dataset once nothing is missing.

    Responses that failed are asked for again by the next run, and by it alone. An interrupted run
    keeps its committed tasks.

    Args:
        config: the settings.
        engine: where responses are drawn; default: in this process.

    Raises:
        DataError: a prompt breaks a rule, or the folder holds something else. Nothing was asked.
        ConfigError: a sampler's model, key or package is missing, or a server refuses every
            request.
        StorageError: no room; committed tasks stay.
    """
    # Resolved: workers may have another working folder.
    root = local_folder("output_dir", config.output_dir).resolve()
    claim_folder(root)
    run = _Run(config, root)
    if (finished := run.finished()) is not None:
        return run.result(finished)
    for name, stage in run.stages.items():
        if run.settings[name].ready:
            run_stage(stage, engine or WorkerSettings(show_progress=config.show_progress))
    found = run.result(None)
    # What was never asked for is not what `gaps: drop` means.
    if found.n_gaps and not (config.gaps == "drop" and found.asked):
        return run.with_requests(found)
    return replace(found, manifest=run.publish(found))


class _Run:
    """One run: its prompts, and a stage for each sampler."""

    def __init__(self, config: SampleConfig, root: Path) -> None:
        self.config = config
        self.root = root
        self.settings = config.parsed()
        dialect = DatasetTokenizer(config.tokenizer_name_or_path, config.chat_template)
        self.samplers = {name: open_sampler(s, dialect) for name, s in self.settings.items()}
        self.facts = {name: sampler.facts() for name, sampler in self.samplers.items()}
        encoder = load_encoder(self._import_config())
        assert encoder is not None
        limits = {
            name: facts.context_length - self.settings[name].max_new_tokens
            for name, facts in self.facts.items()
            if facts.context_length is not None
        }
        self.prompts = prepare_prompts(config, encoder, limits)
        self.stages = {name: self._stage(name, self.samplers[name]) for name in self.settings}
        self.identity = sha256_json(
            [
                _VERSION,
                self.prompts.entry.sha256,
                [stage.name for stage in self.stages.values()],
                config.gaps,
            ]
        )

    def _import_config(self) -> ImportConfig:
        samplers = {
            name: {**recorded(settings), **self.facts[name].identity}
            for name, settings in self.settings.items()
        }
        return ImportConfig(
            inputs=[f"samples/{name}" for name in self.settings],
            output_dir=self.config.output_dir,
            tokenizer_name_or_path=self.config.tokenizer_name_or_path,
            chat_template=self.config.chat_template,
            samplers=samplers,
            singletons=self.config.gaps,
            show_progress=self.config.show_progress,
        )

    def _stage(self, name: str, sampler: Sampler) -> SampleStage:
        settings, facts = self.settings[name], self.facts[name]
        identity = sha256_json(
            {
                "version": _VERSION,
                "prompts": self.prompts.entry.sha256,
                "name": name,
                "kind": type(settings).__name__,
                "settings": settings.identity(),
                "facts": dict(facts.identity),
            }
        )
        log = SampleLog(self.root, name, f"sample-{name}-{identity[:12]}")
        return SampleStage(self.prompts, sampler, log, settings.responses, settings.seed)

    def finished(self) -> Manifest | None:
        """The dataset that this very run made, or None if there is none yet.

        Raises:
            DataError: the folder holds another.
        """
        if not manifest_versions(self.root):
            return None
        manifest = load_manifest(self.root)
        if any(step.config.get("sampling") == self.identity for step in manifest.lineage):
            return manifest
        raise DataError(
            "the output folder is empty, or holds what an earlier run of the same command left",
            received=f"a dataset of {manifest.n_groups} groups, made from other prompts, samplers "
            "or settings",
            remedy="choose another output_dir, and merge the two datasets if you want both",
            file=self.root,
        )

    def result(self, manifest: Manifest | None) -> SampleResult:
        """What there is, and what is missing."""
        gaps = {
            name: Counter(cause for _, cause in stage.gaps()) for name, stage in self.stages.items()
        }
        total = self.prompts.entry.rows
        responses = {
            name: total * self.settings[name].responses - causes.total()
            for name, causes in gaps.items()
        }
        asked = all(stage.asked for stage in self.stages.values())
        return SampleResult(manifest, responses, gaps, self.prompts.counts, asked=asked)

    def publish(self, found: SampleResult) -> Manifest:
        """Make the dataset of what there is, and remove what attempts left that lost."""
        given = [name for name, n in found.responses.items() if n]
        settings = {k: v for k, v in asdict(self.config).items() if k not in _NOT_RECORDED}
        missing = {name: causes.total() for name, causes in found.gaps.items()}
        log = Log(
            stage="sample",
            config={**settings, "sampling": self.identity, "missing": missing},
            inputs=self.prompts.inputs,
            sources=[SampledRows(self.prompts, self.stages[name].log) for name in given],
            format=SampledFormat(),
        )
        described = self._import_config()
        samplers = {name: described.samplers[name] for name in given}
        manifest = import_log(replace(described, samplers=samplers), log).manifest
        _sweep(self.root)
        return manifest

    def with_requests(self, result: SampleResult) -> SampleResult:
        """The result, and request files for what batch samplers still miss."""
        paths: list[Path] = []
        for name, stage in self.stages.items():
            if isinstance(settings := self.settings[name], BatchSettings):
                from gvpo_offline.sampling.batch import write_requests

                folder = self.root / "batches" / name
                paths += write_requests(folder, settings, (wanted for wanted, _ in stage.gaps()))
        return replace(result, requests=paths)


def _sweep(root: Path) -> None:
    """Remove the files under `samples/` and `prompts/` that no commit record names."""
    logs = [TaskLog(root, f.name) for f in (root / "commits").iterdir()]
    logs = [log for log in logs if log.stage.startswith(SAMPLING_STAGES)]
    records = [log.peek(path.stem) for log in logs for path in log.folder.glob("*.json")]
    kept = {root / entry.path for record in records if record for entry in record.files}
    for folder in ("samples", "prompts"):
        for path in (root / folder).rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()
