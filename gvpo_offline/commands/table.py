"""All commands by name, in the order in which `gvpo-offline --help` lists them.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from gvpo_offline.commands import datasets, doctor, making, plan, report, sharing, training
from gvpo_offline.commands.command import Command

COMMANDS: dict[str, Command] = {
    **making.COMMANDS,
    **datasets.COMMANDS,
    **doctor.COMMANDS,
    **report.COMMANDS,
    **plan.COMMANDS,
    **sharing.COMMANDS,
    **training.COMMANDS,
}
