"""Seconds until ``lopa`` has said what it is asked, over those of importing Lightning and transformers alone."""

from __future__ import annotations

import functools
import sys

from tests.benchmarks.harness import ROOT, Row, Spawn, parser, ratios, report, spawn, summary, take_turns, use_clock

_IMPORTS = "import of lightning.pytorch and transformers"
_COMMANDS = {
    "lopa --help": ["--help"],
    "lopa fit --print_config": ["fit", "--config", str(ROOT / "configs" / "glue_rte.yaml"), "--print_config"],
}
_GOALS = {"lopa --help": "0.7 s", "lopa fit --print_config": "<= 1.3"}
_COLUMNS = {"command": "command", "seconds_each": "s", "ratio": "over the imports", "goal": "goal"}


def measure(rounds: int, run: Spawn) -> list[Row]:
    """The lines of the table."""
    alternatives = {
        _IMPORTS: functools.partial(run, ["tests.benchmarks.imports"], {}),
        **{name: functools.partial(run, ["lopa_lightning", *given], {}) for name, given in _COMMANDS.items()},
    }
    seconds = take_turns(alternatives, rounds)
    return [
        {
            "command": name,
            "seconds_each": summary(found),
            "ratio": ratios(found, seconds[_IMPORTS]),
            "goal": _GOALS.get(name),
            "seconds": found,
        }
        for name, found in seconds.items()
    ]


def main(arguments: list[str] | None = None, run: Spawn = spawn) -> None:
    """Runs the benchmark."""
    given = parser("startup", __doc__).parse_args(arguments)
    use_clock("wall")  # other processes' time is no time of this one
    report("startup", given, measure(1 if given.quick else given.rounds, run), _COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])
