"""The whole sampling run: the prompts, one stage for each sampler, and the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.encode import load_encoder
from gvpo_offline.importing.folder import SAMPLING_STAGES
from gvpo_offline.importing.formats.shared.log_format import StageLog
from gvpo_offline.importing.importer import import_log, import_stage
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.sampling.gather import SampledFormat, SampledRows
from gvpo_offline.sampling.log import SampleLog
from gvpo_offline.sampling.prompts import prepare_prompts
from gvpo_offline.sampling.sampler_logprobs import lines_about_gaps
from gvpo_offline.sampling.samplers import open_sampler
from gvpo_offline.sampling.settings import BatchSettings, SampleConfig, recorded
from gvpo_offline.sampling.stage import Sampler, SampleStage
from gvpo_offline.sampling.system_prompts import PromptsUnderSystem, system_prompts
from gvpo_offline.sampling.tokenizers import DatasetTokenizer
from gvpo_offline.secret_settings import public
from gvpo_offline.store.commit import TaskLog
from gvpo_offline.store.leftovers import stages_at_work
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_versions
from gvpo_offline.store.within import path_within
from gvpo_offline.store.writer import claim_folder
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings

# Increase it when the same prompts and settings give other responses than before.
_VERSION = 1
_CAUSES_SHOWN = 3
_WITHOUT_LOGPROBS = "without_sampler_logprobs"
_NOT_RECORDED = ("output_dir", "show_progress", "samplers", "limits")


@dataclass(frozen=True)
class SampleResult:
    """Result of a sampling run.

    Attributes:
        manifest: of the dataset; None while responses are missing.
        responses: number of responses, by sampler.
        gaps: number of missing responses by cause, by sampler.
        counts: number of dropped prompts, by reason.
        requests: request files that were written, for the user to upload.
        asked: whether each response was requested at least once, by this shard or another.
        without_logprobs: number of responses whose log-prob under their sampler is not known, by
            cause, by sampler; those with all log-probs are left out.
    """

    manifest: Manifest | None
    responses: dict[str, int]
    gaps: dict[str, Counter[str]]
    counts: dict[str, int]
    requests: Sequence[Path] = ()
    asked: bool = True
    without_logprobs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def n_gaps(self) -> int:
        """Number of missing responses."""
        return sum(causes.total() for causes in self.gaps.values())

    def lines(self) -> list[str]:
        """The result as lines of text."""
        lines = [f"{n:,} prompts dropped: {name}" for name, n in self.counts.items()]
        for name, n in self.responses.items():
            causes = self.gaps[name]
            lines.append(f"sampler {name}: {n:,} responses, {causes.total():,} missing")
            lines += [f"  {n:,}x {cause}" for cause, n in causes.most_common(_CAUSES_SHOWN)]
        lines += [f"requests to upload: {path}" for path in self.requests]
        if self.manifest is not None:
            lines.append(f"dataset: {self.manifest.n_groups:,} groups")
            if self.manifest.n_incomplete:
                lines.append(
                    f"{self.manifest.n_incomplete:,} incomplete groups: prompts with one response"
                )
            lines += lines_about_gaps(self.without_logprobs)
        return lines


def run_sample(config: SampleConfig, worker_settings: WorkerSettings | None = None) -> SampleResult:
    """Sample the missing responses, and make the dataset once none is missing.

    The next run repeats failed responses alone. An interrupted run keeps its committed tasks.

    Args:
        config: the settings.
        worker_settings: where the samplers run; default: in this process.

    Raises:
        DataError: a prompt is invalid, or the folder holds something else; no sampler was started.
        ConfigError: a sampler's model, key or package is missing, or a server rejects every
            request.
        StorageError: no room; committed tasks are kept.
    """
    # Resolved, since workers may have another working directory.
    root = local_folder("output_dir", config.output_dir).resolve()
    claim_folder(root)
    with stages_at_work(root):
        return _run_in(config, root, worker_settings)


def _run_in(
    config: SampleConfig, root: Path, worker_settings: WorkerSettings | None
) -> SampleResult:
    run = _Run(config, root)
    if (finished := run.finished()) is not None:
        return replace(run.result(finished), without_logprobs=run.gaps_of(finished))
    run.check_later_samplers()
    for name, stage in run.stages.items():
        if run.settings[name].ready:
            run_stage(stage, worker_settings or WorkerSettings(show_progress=config.show_progress))
    found = run.result(None)
    # `gaps: drop` concerns failed responses, not those that were never requested.
    if found.n_gaps and not (config.gaps == "drop" and found.asked):
        return run.with_requests(found)
    manifest = run.publish(found)
    return replace(found, manifest=manifest, without_logprobs=run.gaps_of(manifest))


class _Run:
    """One run: its prompts, and a stage for each sampler."""

    def __init__(self, config: SampleConfig, root: Path) -> None:
        self.config = config
        self.root = root
        self.settings = config.parsed()
        self.tokenizer = DatasetTokenizer(config.tokenizer_name_or_path, config.chat_template)
        self.samplers = {
            name: open_sampler(own, self.tokenizer, config.limits)
            for name, own in self.settings.items()
        }
        self.info = {name: sampler.info() for name, sampler in self.samplers.items()}
        encoder = load_encoder(self._import_config())
        assert encoder is not None
        limits = {
            name: info.context_length - self.settings[name].max_new_tokens
            for name, info in self.info.items()
            if info.context_length is not None
        }
        self.prompts = prepare_prompts(config, encoder, limits)
        self.stages = {name: self._stage(name, self.samplers[name]) for name in self.settings}
        self.identity = sha256_json(
            [
                _VERSION,
                self.prompts.entry.sha256,
                [stage.name for stage in self.stages.values()],
                config.gaps,
                # A setting of a later version, which is absent at its default.
                *(["keep_singletons"] if config.keep_singletons else []),
            ]
        )

    def _import_config(self) -> ImportConfig:
        samplers = {
            name: {**recorded(settings), **self.info[name].identity}
            for name, settings in self.settings.items()
        }
        return ImportConfig(
            inputs=[f"samples/{name}" for name in self.settings],
            output_dir=self.config.output_dir,
            tokenizer_name_or_path=self.config.tokenizer_name_or_path,
            chat_template=self.config.chat_template,
            samplers=samplers,
            singletons="keep" if self.config.keep_singletons else self.config.gaps,
            show_progress=self.config.show_progress,
        )

    def _stage(self, name: str, sampler: Sampler) -> SampleStage:
        settings, info = self.settings[name], self.info[name]
        identity = sha256_json(
            {
                "version": _VERSION,
                "prompts": self.prompts.entry.sha256,
                "name": name,
                "kind": type(settings).__name__,
                "settings": settings.identity(),
                "facts": dict(info.identity),
            }
        )
        log = SampleLog(self.root, name, f"sample-{name}-{identity[:12]}")
        system = system_prompts({name: settings}).get(name)
        own_prompts = PromptsUnderSystem(system, self.tokenizer) if system else None
        parts = (self.prompts, sampler, log, settings.responses, settings.seed)
        return SampleStage(*parts, own_prompts)

    def finished(self) -> Manifest | None:
        """The dataset that a run with these prompts and settings made, or None.

        Raises:
            DataError: the folder holds another dataset.
        """
        if not manifest_versions(self.root):
            return None
        manifest = load_manifest(self.root)
        if any(step.config.get("sampling") == self.identity for step in manifest.lineage):
            return manifest
        raise DataError(
            "the output folder is empty, or as an earlier run of the same command left it",
            received=f"a dataset of {manifest.n_groups} groups, made from other prompts, samplers "
            "or settings",
            remedy="choose another output_dir, and merge both datasets if you need both",
            file=self.root,
        )

    def check_later_samplers(self) -> None:
        """Check the samplers that start only when another one has given all of its responses.

        Raises:
            ConfigError, DataError: one of them cannot start.
        """
        pending = [
            name
            for name, stage in self.stages.items()
            if self.settings[name].ready and next(stage.gaps(), None) is not None
        ]
        for name in pending[1:]:
            self.samplers[name].check()

    def result(self, manifest: Manifest | None) -> SampleResult:
        """The result: which responses exist, and which are missing."""
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
        """Make the dataset of the existing responses, and remove uncommitted files."""
        given = [name for name, n in found.responses.items() if n]
        described = self._import_config()
        described = replace(described, samplers={n: described.samplers[n] for n in given})
        log = self._log(found, given)
        begun = [path.name for path in (self.root / "commits").glob("import-*")]
        if begun and import_stage(described, log) not in begun:
            earlier = self._log(found, given, logprobs=False)
            log = earlier if import_stage(described, earlier) in begun else log
        manifest = import_log(described, log).manifest
        _sweep(self.root)
        return manifest

    def _log(self, found: SampleResult, given: Sequence[str], *, logprobs: bool = True) -> StageLog:
        """The responses of some samplers as rows to import.

        Args:
            found: which responses exist.
            given: the samplers that have responses.
            logprobs: as for `SampledRows`.
        """
        config = public(asdict(self.config))
        settings = {k: v for k, v in config.items() if k not in _NOT_RECORDED}
        missing = {name: causes.total() for name, causes in found.gaps.items()}
        sources = [
            SampledRows(
                *(self.prompts, self.stages[name].log, self.settings[name]), logprobs=logprobs
            )
            for name in given
        ]
        gaps = {
            name: dict(source.without_logprobs)
            for name, source in zip(given, sources, strict=True)
            if source.without_logprobs
        }
        return StageLog(
            stage="sample",
            config={
                **settings,
                "sampling": self.identity,
                "missing": missing,
                **({_WITHOUT_LOGPROBS: gaps} if gaps else {}),
            },
            inputs=self.prompts.inputs,
            sources=sources,
            format=SampledFormat(),
        )

    def gaps_of(self, manifest: Manifest) -> Mapping[str, Mapping[str, int]]:
        """The responses without log-prob in the dataset of this run, by cause, by sampler."""
        step = next(s for s in manifest.lineage if s.config.get("sampling") == self.identity)
        found: Mapping[str, Mapping[str, int]] = step.config.get(_WITHOUT_LOGPROBS, {})
        return found

    def with_requests(self, result: SampleResult) -> SampleResult:
        """The result, with request files for the responses that batch samplers miss."""
        paths: list[Path] = []
        for name, stage in self.stages.items():
            if isinstance(settings := self.settings[name], BatchSettings):
                from gvpo_offline.sampling.batch import write_requests

                folder = self.root / "batches" / name
                paths += write_requests(folder, settings, (request for request, _ in stage.gaps()))
        return replace(result, requests=paths)


def _sweep(root: Path) -> None:
    """Remove files under `samples/` and `prompts/` that no commit record names."""
    logs = [TaskLog(root, f.name) for f in (root / "commits").iterdir()]
    logs = [log for log in logs if log.stage.startswith(SAMPLING_STAGES)]
    records = [log.peek(path.stem) for log in logs for path in log.folder.glob("*.json")]
    kept = {root / entry.path for record in records if record for entry in record.files}
    for folder in ("samples", "prompts"):
        for path in (root / folder).rglob("*"):
            if path.is_file() and path not in kept:
                path_within(root, str(path.relative_to(root))).unlink()
