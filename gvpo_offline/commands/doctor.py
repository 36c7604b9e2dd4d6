"""`gvpo-offline doctor`: what is left over, cut off or damaged in a folder."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from gvpo_offline.commands.command import Command, filled
from gvpo_offline.commands.console import say
from gvpo_offline.doctor.settings import DoctorConfig
from gvpo_offline.exit_status import FAILED, OK
from gvpo_offline.store.location import RemoteSettings


def _run_doctor(values: dict[str, Any]) -> int:
    from gvpo_offline.doctor.diagnose import diagnose
    from gvpo_offline.doctor.finding import Diagnosis, Finding

    values["remote"] = RemoteSettings(**values["remote"])
    config = filled(DoctorConfig, values)

    def line(own: Finding) -> str:
        where = os.path.relpath(own.path, found.root)
        return f"  {own.kind:<10} {where} ({own.bytes:,} bytes): {own.why}"

    def lines(found: Diagnosis) -> list[str]:
        removed = sum(own.bytes for own in found.removed)
        told = [f"removed {len(found.removed):,}: {removed:,} bytes"] if found.removed else []
        told += map(line, found.removed)
        left = f"{len(found.findings):,} findings" if found.findings else "nothing is left over"
        busy = "; a process works in it, whose files may be among them" if found.busy else ""
        told += [f"{config.path}: {found.of}, {left}{busy}", *map(line, found.findings)]
        if found.removable and not found.busy:
            again = shlex.join(["gvpo-offline", "doctor", config.path, "--remove"])
            told.append(f"next: {again}")
        return told

    found = diagnose(config)
    say(*([json.dumps(found.as_dict())] if config.format == "json" else lines(found)))
    return FAILED if found.damaged else OK


COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "List what is left over, cut off or damaged in a dataset or a run; remove it on request.",
        _run_doctor,
        (DoctorConfig,),
        "Example: gvpo-offline doctor --path data; then gvpo-offline doctor data --remove. The "
        "exit status is 1 if something is damaged that no removal mends.",
        positional="path",
    ),
}
