"""Runs that differ in their seed alone, as one group; groups beside each other, as a table."""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import UsageError
from .runs import Run

# Flags that say where a run lies, what it shows and what it runs on, but change no result.
_WITHOUT_EFFECT = frozenset((
    'output', 'experiment', 'workers', 'pin_mem', 'use_multi_epochs_loader', 'log_interval', 'recovery_interval',
    'val_interval', 'save_epochs', 'checkpoint_hist', 'save_images', 'resume', 'no_resume_opt', 'start_epoch',
    'local_rank', 'device', 'device_modules', 'synchronize_step', 'dataset_download', 'log_wandb', 'wandb_project',
    'wandb_tags', 'wandb_resume_id', 'log_tensorboard', 'push_to_hub', 'hub_private', 'hub_license', 'hub_revision',
    'no_teacher_eval', 'teacher_cache', 'teacher_cache_rebuild',
))
# Flags that say whether a run distils.
_DISTILLING = 'kd_loss', 'teacher', 'kd_model_name'
# Beginnings of the flags that act in distillation alone; `--teacher-cache` switches `replayable_data` on.
_OF_DISTILLATION = 'kd_', 'teacher', 'task_loss_weight', 'distill_loss_weight', 'replayable_data'


def settings_of(run: Run) -> dict[str, Any]:
    """Return the flags of a run that may change its result, seed left out."""
    settings = {name: value for name, value in run.args.items() if name not in _WITHOUT_EFFECT and name != 'seed'}
    for name in ('data', 'data_dir'):  # a data set is known by the last part of its path
        if settings.get(name):
            settings[name] = Path(settings[name]).name
    return settings


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a group.

    Attributes:
        mean: The mean.
        deviation: Standard deviation of the sample, None for a single run.
        count: Number of runs that have the figure.
    """
    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> 'Spread | None':
        """Return the spread of those values that are known, or None where none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, len(known))

    def minus(self, other: 'Spread') -> 'Spread':
        """Return the difference of two means; its deviation is the standard error of the difference."""
        error = None
        if self.deviation is not None and other.deviation is not None:
            error = math.sqrt(self.deviation ** 2 / self.count + other.deviation ** 2 / other.count)
        return Spread(self.mean - other.mean, error, min(self.count, other.count))

    def __str__(self) -> str:
        digits = 0 if abs(self.mean) >= 100 else 2
        return f'{self.mean:.{digits}f}' + (f' ± {self.deviation:.{digits}f}' if self.deviation else '')


@dataclass(frozen=True)
class Group:
    """Runs with the same settings.

    Attributes:
        runs: The runs, in the order of their seeds.
        label: The settings that tell the group from the others, for a legend.
        settings: What the runs share.
        different: What `label` says, by flag; `-` where a flag is unset.
    """
    runs: list[Run]
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)

    def spread(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """Return a figure of the runs over the seeds."""
        return Spread.of(map(figure, self.runs))

    @property
    def state(self) -> str:
        """The epochs done, and the state of the runs that are not done."""
        done = sorted({run.epochs_done for run in self.runs})
        states = sorted({run.state for run in self.runs} - {'done'})
        epochs = f'{done[0]}' if len(done) == 1 else f'{done[0]}-{done[-1]}'
        planned = max((run.epochs_planned or 0 for run in self.runs), default=0)
        return f'{epochs} of {planned}, {", ".join(states)}' if states and planned else ', '.join([epochs, *states])


def group_runs(runs: list[Run]) -> list[Group]:
    """Put the runs that differ in their seed alone together, and find what tells the groups apart.

    A flag that some of the runs do not know (those of timm's script or of another version of this one) tells no run
    apart by that; but a run that does not know the flags of distillation does not distil.
    """
    settings = [settings_of(run) for run in runs]
    differing = [
        name for name in dict.fromkeys(name for own in settings for name in own)
        if len({repr(own.get(name)) for own in settings if name in own or (own and name in _DISTILLING)}) > 1
    ]
    by_flags: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run, own in zip(runs, settings, strict=True):
        # A run that ended before it wrote its flags is a group of its own.
        key = repr([own.get(name) for name in differing]) if own else str(run.folder)
        by_flags.setdefault(key, (own, []))[1].append(run)
    groups = []
    for own, members in by_flags.values():
        members.sort(key=lambda run: (run.args.get('seed') or 0, str(run.folder)))
        different = {name: _text(own.get(name)) or '-' for name in differing}
        label = ' '.join(f'{name}={value}' for name, value in different.items() if value != '-')
        groups.append(Group(members, label or str(own.get('model') or members[0].folder.name), own, different))
    return groups


def _text(value: Any) -> str:
    if value is None or value is False or value == '' or value == [] or value == {}:
        return ''
    if isinstance(value, dict):
        return ' '.join(f'{key}={item}' for key, item in value.items())
    if isinstance(value, list):
        return ' '.join(map(_text, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def last(column: str) -> Callable[[Run], float | None]:
    """Return a function that gives a column of summary.csv after the last epoch of a run."""
    return lambda run: next((row[column] for row in reversed(run.rows) if column in row), None)


def best(column: str) -> Callable[[Run], float | None]:
    """Return a function that gives the best value of a column of summary.csv, the least where it is a loss."""
    def figure(run: Run) -> float | None:
        values = [row[column] for row in run.rows if column in row]
        return (min if is_loss(column) else max)(values) if values else None
    return figure


def is_loss(column: str) -> bool:
    """Tell whether less is better."""
    return column.endswith('loss') or column.startswith('train_')


@dataclass(frozen=True)
class Row:
    """A group in the table: its figures by column."""
    group: Group
    figures: dict[str, Spread | None]


def tabulate(groups: list[Group], metric: str = 'eval_top1', baseline: Path | None = None) -> list[Row]:
    """Compute the figures of each group, best first by `metric`, a column of summary.csv.

    All are compared with the group of the run `baseline`; without it, each with the group without distillation that is
    otherwise equal.

    Raises:
        UsageError: If no run has the metric, or the baseline is none of the runs.
    """
    columns = dict.fromkeys(column for group in groups for run in group.runs for row in run.rows for column in row)
    if columns and metric not in columns:
        raise UsageError(f'--metric {metric}: no summary.csv has such a column, they have {", ".join(columns)}.')
    fixed = None
    if baseline is not None:
        fixed = next((group for group in groups
                      if any(run.folder.resolve() == baseline.resolve() for run in group.runs)), None)
        if fixed is None:
            raise UsageError(f'--baseline {baseline}: none of the runs.')
    name = metric.removeprefix('eval_')
    rows = []
    for group in groups:
        own = group.spread(last(metric))
        reference = fixed or _baseline_of(group, groups)
        other = reference.spread(last(metric)) if reference is not None and reference is not group else None
        rows.append(Row(group, {
            f'best {name}': group.spread(best(metric)),
            f'last {name}': own,
            'to baseline': own.minus(other) if own and other else None,
            'teacher top1': group.spread(lambda run: run.teacher_top1),
            'agreement': group.spread(last('eval_agreement')),
            'images/s': group.spread(lambda run: run.images_per_second),
        }))
    sign = 1 if is_loss(metric) else -1
    return sorted(rows, key=lambda row: sign * own.mean if (own := row.figures[f'last {name}']) else math.inf)


def _baseline_of(group: Group, groups: list[Group]) -> Group | None:
    """Return the group that trains without distillation and is otherwise equal, if there is one."""
    def apart_from_distillation(group: Group) -> dict[str, str]:
        return {name: value for name, value in group.different.items() if not name.startswith(_OF_DISTILLATION)}

    for other in groups:
        distils = any(other.settings.get(name) for name in _DISTILLING)
        if other.settings and not distils and apart_from_distillation(other) == apart_from_distillation(group):
            return other
    return None
