"""The model card of a trained student: every figure in it comes from the run's own files."""
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, is_model

from ..losses import KD_LOSSES
from ..losses.base import Paper
from ..report.runs import Run
from .scrub import scrub

_DEIT = """@inproceedings{touvron2021training,
  author = {Hugo Touvron and Matthieu Cord and Matthijs Douze and Francisco Massa and Alexandre Sablayrolles and
            Herv{\\'e} J{\\'e}gou},
  title = {Training data-efficient image transformers \\& distillation through attention},
  booktitle = {International Conference on Machine Learning (ICML)},
  note = {arXiv:2012.12877},
  year = {2021}
}"""
_HEADS = r'\\(z_d\\) the logits of the distillation head, \\(z_t\\) those of the teacher, \\(p\\) their softmax'

# What timm's own distillation tasks compute, by `kd_distill_type` and `kd_token_distill_type`.
_TIMM_TASKS = {
    ('feature', None): Paper(
        title='Feature distillation, as timm has it',
        formula=r'D = \operatorname{mean}\,\tfrac{1}{n}\,\|W f_s + b - f_t\|^2',
        symbols=r'\\(f_s\\) and \\(f_t\\) the pooled features of student and teacher, \\(n\\) the width of the latter, '
                r'\\(W\\) and \\(b\\) a trained projection where the widths differ',
        citations=(),
    ),
    ('token', 'soft'): Paper(
        title='Soft distillation through a token',
        formula=r'D = T^2\,\operatorname{mean}\,\mathrm{KL}\big(p(z_t/T)\,\|\,p(z_d/T)\big)',
        symbols=_HEADS,
        citations=(_DEIT,),
    ),
    ('token', 'hard'): Paper(
        title='Hard distillation through a token',
        formula=r'D = -\operatorname{mean}\,\log p_{y_t}(z_d),\quad y_t = \operatorname{arg\,max} z_t',
        symbols=_HEADS,
        citations=(_DEIT,),
    ),
}


class Figure(NamedTuple):
    """A figure of a card: its name in the table and in full, the Hub's metric and the arguments of that."""
    name: str
    long_name: str
    metric: str
    metric_args: dict[str, Any] | None = None


# By column of summary.csv.
_SINGLE_LABEL = {
    'eval_top1': Figure('Top-1', 'Top-1 accuracy', 'accuracy', {'top_k': 1}),
    'eval_top5': Figure('Top-5', 'Top-5 accuracy', 'accuracy', {'top_k': 5}),
}
_MULTI_LABEL = {
    'eval_map': Figure('mAP', 'Mean average precision', 'mean_average_precision'),
    **{f'eval_{kind}_f1': Figure(f'F1, {kind}', f'F1, {kind} average', 'f1', {'average': average})
       for kind, average in (('micro', 'micro'), ('macro', 'macro'), ('sample', 'samples'))},
}


def _figures(run: Run) -> dict[str, Figure]:
    return _MULTI_LABEL if run.args.get('task') == 'multilabel' else _SINGLE_LABEL


@dataclass(frozen=True)
class Publication:
    """Where a student is published, and what only its author can say about it.

    Attributes:
        repo_id: `owner/name`.
        revision: The branch, `main` where None.
        license: A licence identifier of the Hub.
        dataset: The training data's id on the Hub.
    """
    repo_id: str
    revision: str | None = None
    license: str | None = None
    dataset: str | None = None


def model_card(run: Run, publication: Publication, epoch: int | None, is_ema: bool, has_curves: bool) -> ModelCard:
    """Return the card: `card.md.jinja`, filled in with the figures of `epoch`, that of the published checkpoint."""
    record, metrics, loss = run.record, run.epoch(epoch), run.record.get('loss')
    title = publication.repo_id.split('/')[-1]
    command = shlex.join(scrub(shlex.split(record['command'])))
    teachers = [
        {**teacher, 'name': _hub_id(teacher['source']) or scrub(teacher['source']).removeprefix('local-dir:'),
         'hub_id': quote(_hub_id(teacher['source']) or '')}
        for teacher in record.get('teacher') or []
    ]
    return ModelCard.from_template(
        _metadata(run, publication, title, [teacher['name'] for teacher in teachers], metrics),
        template_path=str(Path(__file__).with_name('card.md.jinja')),
        title=title,
        student={**record['student'], 'model': scrub(record['student']['model'])},
        teachers=teachers,
        base_model=_hub_id(record['student'].get('pretrained_source')),
        metrics=metrics,
        epoch=epoch,
        is_ema=is_ema,
        loss=loss,
        **_statement(loss, bool(teachers)),
        multi_label=_figures(run) is _MULTI_LABEL,
        figures=_figures(run),
        images=record['student']['data_config'],
        spec=f'hf-hub:{publication.repo_id}' + (f'@{publication.revision}' if publication.revision else ''),
        command=command,
        fence='`' * max([3, *(1 + len(ticks) for ticks in re.findall('`+', command))]),  # longer than any in the block
        versions=record,
        has_curves=has_curves,
        code=_code,
        escape=_escape,
        quote=shlex.quote,
        repr=repr,
    )


def _statement(loss: dict[str, Any] | None, with_teacher: bool) -> dict[str, Any]:
    """Return what the class of the run's loss says of it; of one that is not registered here, its parameters alone."""
    if loss is None:
        return {}
    values = loss['parameters']
    timms = _TIMM_TASKS.get((loss['name'], values.get('distill_type')))
    if timms is not None:
        return {'paper': timms, 'parameters': values, 'citations': timms.citations}
    if loss['name'] not in KD_LOSSES:
        return {'parameters': values}
    paper, knobs = KD_LOSSES[loss['name']].stated(with_teacher), KD_LOSSES[loss['name']].knobs()
    noted = [knob for knob in knobs if knob.metadata['note']]
    switched_on = [knob.metadata for knob in noted if values.get(knob.name)]
    return {
        'paper': paper,
        'parameters': {
            f'{knob.name}, {knob.metadata["help"]}': values[knob.name]
            for knob in knobs if knob.name in values and knob not in noted
        },
        'notes': [metadata['note'] for metadata in switched_on],
        'citations': [*paper.citations, *(metadata['citation'] for metadata in switched_on)],
    }


def _metadata(
        run: Run,
        publication: Publication,
        title: str,
        teachers: list[str],
        metrics: dict[str, float],
) -> ModelCardData:
    loss, args = run.record.get('loss'), run.args
    start = _hub_id(run.record['student'].get('pretrained_source'))
    source = args.get('dataset') or ''
    # timm reads `--dataset hfds/owner/name` from the Hub.
    dataset = publication.dataset or (source.removeprefix('hfds/') if source.startswith('hfds/') else None)
    local = scrub(str(args.get('data_dir') or args.get('data') or source or 'unnamed'))
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset or 'imagefolder',
            dataset_name=dataset or local,
            dataset_split=args.get('val_split'),
            metric_type=figure.metric,
            metric_name=figure.long_name,
            metric_args=figure.metric_args,
            # The Hub's figures are fractions, timm's percentages.
            metric_value=round(metrics[column] / 100, 6),
        )
        for column, figure in _figures(run).items() if column in metrics
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=[
            'timm', 'image-classification', *(['knowledge-distillation', loss['name']] if loss else []),
            *(f'teacher:{teacher}' for teacher in teachers),
        ],
        license=publication.license,
        datasets=[dataset] if dataset else None,
        base_model=start,
        base_model_relation='finetune' if start else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _hub_id(source: str | None) -> str | None:
    """Return `owner/name` of `hf-hub:owner/name@revision` or of a timm model name; None of anything else."""
    if not source:
        return None
    if source.startswith(('hf-hub:', 'hf_hub:')):
        return source[len('hf-hub:'):].split('@')[0]
    return get_pretrained_cfg(source).hf_hub_id if is_model(source) else None


def _escape(text: str) -> str:
    """Return text with each sign that Markdown or HTML could take for its own as an entity."""
    return ''.join(sign if sign.isalnum() or sign in ' ./:@=+,-_' else f'&#{ord(sign)};' for sign in text)


def _code(text: str) -> str:
    """Return text as inline code, of a table too; a name that a user made up may hold backticks and bars."""
    return f'`{text}`' if _escape(text) == text else f'<code>{_escape(text)}</code>'
