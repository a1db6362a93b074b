"""What can go wrong with a benchmark; exit status 1 is left to gates, so these have 2 (yours) and 3 (the machine's)."""

from __future__ import annotations

from llm_daemon.errors import LlmDaemonError, UsageError


class SuiteError(UsageError):
    """A suite file that cannot be run as it is; the message names file and line."""

    code = "bad_suite"


class ResultsError(UsageError):
    """A folder that holds no results, or some that this version cannot read."""

    code = "bad_results"


class MachineError(LlmDaemonError):
    """The machine's: no target could be run, the disk is full, the results cannot be written."""

    code = "environment"
    exit_status = 3
