"""How groups of verbs explain themselves with `--help`."""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperGroup

SENTENCE = 200
"""Greatest number of characters of a verb's description, which may take several lines."""


class Group(TyperGroup):
    """A group whose help describes each verb in a whole sentence, however narrow the terminal is."""

    def sections(self, ctx: Any) -> Mapping[str, Sequence[str]]:
        """Return heading -> the verbs below it."""
        return {"Commands": self.list_commands(ctx)}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, verbs in self.sections(ctx).items():
            with formatter.section(heading):
                formatter.write_dl([(verb, self.commands[verb].get_short_help_str(SENTENCE)) for verb in verbs])
