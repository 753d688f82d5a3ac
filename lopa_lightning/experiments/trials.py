"""What the trials of a sweep say together: pure functions from settings and results to text."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lopa_lightning.experiments.report import markdown_table
from lopa_lightning.experiments.result import Result
from lopa_lightning.experiments.summary import Figure

Trial = tuple[dict[str, Any], Result]
"""Option to value, and what came out."""

_SEED = "seed_everything"


def combinations(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values of a grid.

    Args:
        space: Option to values.

    Example:
        >>> combinations({"rank": [1, 2], "seed": [0]})
        [{'rank': 1, 'seed': 0}, {'rank': 2, 'seed': 0}]
    """
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def by_settings(trials: Sequence[Trial]) -> list[tuple[dict[str, Any], Figure, int]]:
    """Scores by what is not the seed, the best first.

    Args:
        trials: Of a sweep; those that failed are left out.

    Returns:
        Settings, mean and spread of their scores over the seeds, and how many.
    """
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for values, result in trials:
        settings = {name: value for name, value in values.items() if name != _SEED}
        if result.done and not math.isnan(result.score):
            groups.setdefault(json.dumps(settings), (settings, []))[1].append(result.score)
    found = [(settings, figure, len(s)) for settings, s in groups.values() if (figure := Figure.of(s)) is not None]
    return sorted(found, key=lambda group: -group[1].mean)


def settings_markdown(groups: Sequence[tuple[dict[str, Any], Figure, int]]) -> str:
    """A table of settings and scores.

    Args:
        groups: As from :func:`by_settings`.
    """
    header = [*short_names(groups[0][0]).values(), "score", "sd", "runs"]
    body = []
    for settings, score, count in groups:
        sd = "–" if score.sd is None else f"{score.sd:.4f}"
        body.append([*map(shown_value, settings.values()), f"{score.mean:.4f}", sd, str(count)])
    return markdown_table(header, body) + "\n"


def trials_csv(trials: Sequence[Trial]) -> str:
    """A line for each trial.

    Args:
        trials: Of a sweep.
    """
    names = list(dict.fromkeys(name for values, _ in trials for name in values))
    measured = ["status", "reason", "score", "best_score", "trained", "seconds_per_step", "seconds", "peak_mb"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, *measured])
    for values, result in trials:
        writer.writerow([*(values[name] for name in names), *(getattr(result, name) for name in measured)])
    return out.getvalue()


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Options by dotted names as a YAML file has them.

    Args:
        values: Dotted name to value.

    Example:
        >>> nested({"trainer.max_epochs": 3, "model.init_args.warmup": 0.1})
        {'trainer': {'max_epochs': 3}, 'model': {'init_args': {'warmup': 0.1}}}
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        here = tree
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return tree


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest ends of options' dotted names that tell them apart, by name.

    Args:
        names: The whole names, all different.

    Example:
        >>> short_names(["model.optimizer.lr", "model.backbone.name", "model.instance_encoder.name"])
        {'model.optimizer.lr': 'lr', 'model.backbone.name': 'backbone.name', \
'model.instance_encoder.name': 'instance_encoder.name'}
    """
    paths = {name: name.split(".") for name in names}

    def ends(length: int) -> Counter[str]:
        return Counter(".".join(path[-length:]) for path in paths.values())

    lengths = range(1, 1 + max(map(len, paths.values()), default=0))
    return {
        name: next(end for n in lengths if ends(n)[end := ".".join(path[-n:])] == 1) for name, path in paths.items()
    }


def shown_value(value: Any) -> str:
    """A value for people: a number in four digits.

    Args:
        value: An option's.
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)
