"""Every error a user can meet: what happened, where, and what to do about it.

Errors cross process borders (island, coordinator, driver), so each one pickles; each kind has its own exit code,
which is what a script that called the command line sees.
"""


class DiLoCoError(Exception):
    """Base of all errors raised on purpose.

    what: one sentence with the offending values. where: file, config field, island or address. remedy: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  what to do: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(kind: type[DiLoCoError], what: str, where: str, remedy: str) -> DiLoCoError:
    return kind(what, where=where, remedy=remedy)


class ConfigError(DiLoCoError):
    """A recipe or an override that cannot be meant; nothing was started."""

    exit_code = 2


class DataError(DiLoCoError):
    """A corpus, tokenizer or prepared data set that cannot serve this run."""

    exit_code = 3


class StoreError(DiLoCoError):
    """A run store that cannot be read or written."""

    exit_code = 4


class CorruptionError(DiLoCoError):
    """Stored bytes that are not what was committed; `where` names the file."""

    exit_code = 5


class FencedError(DiLoCoError):
    """Another coordinator writes this run now; this one must stop."""

    exit_code = 6


class OvertakenError(DiLoCoError):
    """An older coordinator committed one more record before it noticed this one; a replay of the log mends it."""

    exit_code = 6


class RunMismatchError(DiLoCoError):
    """A run folder, message or island that belongs to another run, model or data set."""

    exit_code = 7


class ClusterError(DiLoCoError):
    """The Ray cluster cannot place or keep what the run needs."""

    exit_code = 8


class DeadlineError(DiLoCoError):
    """A wait that ran out; `what` names for whom and how long."""

    exit_code = 9
