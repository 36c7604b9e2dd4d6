"""`gvpo-offline validate`: every file, page, group and sidecar of a dataset, checked; and findings
about what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from gvpo_offline.commands.next_step import after_data
from gvpo_offline.commands.settings import ValidateConfig
from gvpo_offline.errors import DataError, GVPOError, IntegrityError
from gvpo_offline.files import replace_text
from gvpo_offline.findings.formats.checked import Check, check_of
from gvpo_offline.findings.formats.document import document
from gvpo_offline.findings.formats.junit import junit
from gvpo_offline.findings.formats.sarif import sarif
from gvpo_offline.findings.formats.text import text_lines, verdict_line
from gvpo_offline.findings.gate import CheckedDataset, check_dataset, error_finding
from gvpo_offline.findings.thresholds import Thresholds, load_thresholds
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.store.coverage import partial_lines
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.storage import open_storage
from gvpo_offline.visible import visible


def run_validate(config: ValidateConfig) -> CheckedDataset:
    """Check a whole dataset.

    Returns:
        The manifest that was checked, counts of the dataset, and findings.

    Raises:
        ConfigError: the thresholds cannot be read, or `tokenizer_name_or_path` cannot be loaded.
        DataError: a group breaks a rule.
        IntegrityError: a file is missing or altered, or a sidecar does not fit its groups file; or
            `tokenizer_name_or_path` is not the dataset's tokenizer.
    """
    return _checked(config, _thresholds(config), _end_ids(config, _manifest(config)))


def lines_of(config: ValidateConfig) -> tuple[list[str], bool]:
    """What the command prints, and whether the check failed; with `output`, writes the file.

    As text, a damaged file and an invalid group are errors. In the formats for programs they are
    findings, so that there is a document.

    Raises:
        ConfigError, DataError, IntegrityError: as `run_validate`; in the formats for programs,
            DataError only if there is no dataset.
        ConfigError: also if `output` cannot be written.
        StorageError: the disk is full.
    """
    thresholds = _thresholds(config)
    if config.format == "text":
        checked = _checked(config, thresholds, _end_ids(config, _manifest(config)))
        check = check_of(config.dataset, checked, thresholds, config.fail_on)
        plain = [*summary_lines(config.dataset, checked), *text_lines(check)]
        lines = [visible(line, keep="") for line in plain]
        if not check.failed and checked.manifest is not None and not is_url(config.dataset):
            lines.append(after_data(config.dataset, checked.manifest, {}))
    else:
        check = _for_programs(config, thresholds)
        lines = _formatted(config.format, check).splitlines()
    if config.output is None:
        return lines, check.failed
    replace_text(Path(config.output), "".join(f"{line}\n" for line in lines))
    verdict = verdict_line(check.findings, check.verdict)
    return [f"{config.dataset}: {verdict}; written to {config.output}"], check.failed


def summary_lines(dataset: str, found: CheckedDataset) -> list[str]:
    """What was checked, in up to three lines."""
    counts = found.survey
    checked = "light checks only" if found.light else "valid"
    first = (
        f"{dataset}: {checked}. {found.n_files} files, {counts.n_groups:,} groups, "
        f"{counts.n_responses:,} responses, {counts.n_tokens:,} tokens, "
        f"{counts.equal_reward_groups:,} groups of equal rewards, "
        f"{counts.truncated_responses:,} truncated responses"
    )
    lines = [first]
    if found.manifest is not None:
        rewards = ", ".join(f"{r.name}@{r.version}" for r in found.manifest.rewards) or "none"
        references = ", ".join(r.fingerprint[:12] for r in found.manifest.references) or "none"
        lines.append(
            f"version {found.manifest.version}; rewards: {rewards}; references: {references}"
        )
        lines += partial_lines(found.manifest)
        if found.manifest.n_incomplete:
            lines.append(
                f"{found.manifest.n_incomplete:,} incomplete groups: prompts with one response"
            )
    return lines


def _thresholds(config: ValidateConfig) -> Thresholds:
    return load_thresholds(config.thresholds) if config.thresholds else Thresholds()


def _manifest(config: ValidateConfig) -> Manifest | None:
    """The manifest of the dataset; None for a single file."""
    if not is_url(config.dataset) and local_path(config.dataset).is_file():
        return None
    return open_storage(config.dataset, config.remote).manifest()


def _end_ids(config: ValidateConfig, manifest: Manifest | None) -> Collection[int]:
    """The ids of the tokens that end a response, by the tokenizer; none if there is none here.

    Without `tokenizer_name_or_path`, only a folder is opened: a check asks no hub.
    """
    name = config.tokenizer_name_or_path
    recorded = manifest.tokenizer.name_or_path if manifest and manifest.tokenizer else ""
    if config.light or (name is None and not (recorded and Path(recorded).is_dir())):
        return ()
    from gvpo_offline.token_texts import texts_of

    texts, _ = texts_of(manifest or Manifest(groups=[]), name)
    return () if texts is None else texts.ends.keys()


def _checked(
    config: ValidateConfig, thresholds: Thresholds, end_ids: Collection[int]
) -> CheckedDataset:
    def progress(numbers: Iterable[int], label: str) -> Iterable[int]:
        shown: Iterable[int] = ProgressBar(numbers, desc=label, disable=not config.show_progress)
        return shown

    return check_dataset(
        config.dataset,
        thresholds,
        light=config.light,
        progress=progress,
        remote=config.remote,
        end_ids=end_ids,
    )


def _for_programs(config: ValidateConfig, thresholds: Thresholds) -> Check:
    """The check, with the errors of the data as findings."""

    def stopped(error: GVPOError, manifest: Manifest | None = None) -> Check:
        of, version = 1, None
        if manifest is not None:
            files = isinstance(error, IntegrityError)
            of = len(manifest.files()) if files else manifest.n_groups
            version = manifest.version
        found = [error_finding(error, of)]
        return Check(config.dataset, found, thresholds, config.light, config.fail_on, version)

    try:
        manifest = _manifest(config)
    except IntegrityError as error:
        return stopped(error)
    end_ids = _end_ids(config, manifest)
    try:
        checked = _checked(config, thresholds, end_ids)
    except (DataError, IntegrityError) as error:
        return stopped(error, manifest)
    return check_of(config.dataset, checked, thresholds, config.fail_on)


def _formatted(name: str, check: Check) -> str:
    if name == "junit":
        return junit(check)
    return json.dumps(document(check) if name == "json" else sarif(check), indent=2)
