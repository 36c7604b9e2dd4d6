"""The exit statuses of commands, as shells and job schedulers read them."""

from __future__ import annotations

OK = 0
FAILED = 1  # an error that a user can correct, or findings of severity error
NO_COMMAND = 2
UNDECIDED = 3  # `tune` ran to its end, and its trials do not tell which settings are better
INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C
OUTPUT_CLOSED = 141  # 128 + SIGPIPE: nobody reads the output any more
TERMINATED = 143  # 128 + SIGTERM
