"""The model card of a trained student: every figure in it comes from the run's own files."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, is_model

from ..losses import KD_LOSSES
from .run_files import Run, scrub, scrub_command

_HUB = 'https://huggingface.co'
_TIMM = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""


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
    """Writes the card.

    Args:
        run: The run, as `read_run` has it.
        publication: Where it goes, and what only its author can say about it.
        epoch: The epoch of the published checkpoint: its metrics are the card's.
        is_ema: Whether the published weights are the running mean of the student's.
        has_curves: Whether `curves.png` lies beside the card.
    """
    metrics = run.epoch_metrics(epoch)
    sections = [
        _introduction(run, publication),
        _results(run, metrics, epoch, is_ema),
        _loss(run),
        _usage(run, publication),
        _training(run, has_curves),
        _citations(run),
    ]
    body = '\n\n'.join(section for section in sections if section)
    return ModelCard(f'---\n{_metadata(run, publication, metrics).to_yaml()}\n---\n\n{body}\n')


def _metadata(run: Run, publication: Publication, metrics: dict[str, float]) -> ModelCardData:
    student, loss = run.record['student'], run.record.get('loss')
    teachers = [f'teacher:{_teacher_name(teacher)}' for teacher in _teachers(run)]
    tags = ['timm', 'image-classification', *(['knowledge-distillation', loss['name']] if loss else []), *teachers]
    start = _hub_id(student.get('pretrained_source'))
    dataset = publication.dataset or _hub_dataset(run)
    names = {'eval_top1': ('Top-1 accuracy', 1), 'eval_top5': ('Top-5 accuracy', 5)}
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset or 'imagefolder',
            dataset_name=_dataset_name(run, publication),
            dataset_split=run.args.get('val_split'),
            metric_type='accuracy',
            metric_name=name,
            metric_args={'top_k': k},
            # The Hub's accuracy is a fraction, timm's a percentage.
            metric_value=round(metrics[column] / 100, 6),
        )
        for column, (name, k) in names.items() if column in metrics
    ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=tags,
        license=publication.license,
        datasets=[dataset] if dataset else None,
        base_model=start,
        base_model_relation='finetune' if start else None,
        metrics=['accuracy'] if results else None,
        model_name=_title(publication) if results else None,
        eval_results=results or None,
    )


def _introduction(run: Run, publication: Publication) -> str:
    student, loss = run.record['student'], run.record.get('loss')
    teachers = ' and '.join(_teacher_link(teacher) for teacher in _teachers(run))
    what = f'A `{student["model"]}` image classifier of {student["num_classes"]:,} classes'
    if loss:
        what += f', trained by knowledge distillation from {teachers}' if teachers else ', trained by self-distillation'
    start = _hub_id(student.get('pretrained_source'))
    if start:
        what += f', starting from the weights of [{start}]({_HUB}/{start})'
    timm_link = '[timm](https://github.com/huggingface/pytorch-image-models)'
    return f'# {_title(publication)}\n\n{what}. It is a {timm_link} model; `timm-kd` trained it.'


def _results(run: Run, metrics: dict[str, float], epoch: int | None, is_ema: bool) -> str:
    student = run.record['student']
    rows = [('Student', f'`{student["model"]}`', student, metrics.get('eval_top1'), metrics.get('eval_top5'))]
    for teacher in _teachers(run):
        rows.append(('Teacher', _teacher_link(teacher), teacher, teacher.get('top1'), teacher.get('top5')))
    lines = ['| | Model | Parameters | Top-1 (%) | Top-5 (%) |', '|---|---|---:|---:|---:|']
    for role, model, record, top1, top5 in rows:
        lines.append(f'| {role} | {model} | {record["parameters"]:,} | {_percent(top1)} | {_percent(top5)} |')
    notes = []
    if metrics:
        weights = 'the running mean (EMA) of the weights' if is_ema else 'the weights'
        notes.append(f'The student is {weights} after epoch {epoch}; all figures are on the run\'s validation data.')
    if 'eval_agreement' in metrics:
        teacher = 'its teachers' if len(_teachers(run)) > 1 else 'its teacher'
        notes.append(f'It gives the same class as {teacher} on {_percent(metrics["eval_agreement"])} % of the images.')
    return '## Results\n\n' + '\n'.join(lines) + ('\n\n' + ' '.join(notes) if notes else '')


def _loss(run: Run) -> str:
    loss = run.record.get('loss')
    if not loss:
        return ''
    facts = KD_LOSSES[loss['name']].stated(bool(_teachers(run)))
    knobs = KD_LOSSES[loss['name']].knobs()
    lines = [
        f'| {knob.name}, {knob.metadata["help"]} | {loss["parameters"][knob.name]} |' for knob in knobs
        if knob.name in loss['parameters'] and not knob.metadata['note']
    ]
    notes = [knob.metadata['note'] for knob in knobs if loss['parameters'].get(knob.name) is True]
    lines.append(f'| weight of the task loss | {loss["task_loss_weight"]} |')
    lines.append(f'| weight of D | {loss["distill_loss_weight"]} |')
    if loss.get('warmup_epochs'):
        lines.append(f'| epochs over which the weight of D rises | {loss["warmup_epochs"]} |')
    return (
        f'## Loss\n\n{facts.title}: the training loss is the weighted sum of the task loss and\n\n'
        f'$${facts.formula}$$\n\nwith {facts.symbols}; the means are over the images of a batch.'
        + ''.join(f'\n\n{note}' for note in notes)
        + '\n\n| Parameter | Value |\n|---|---|\n' + '\n'.join(lines)
    )


def _usage(run: Run, publication: Publication) -> str:
    student = run.record['student']
    config = student['data_config']
    channels, height, width = config['input_size']
    revision = f'@{publication.revision}' if publication.revision else ''
    name = f'hf-hub:{publication.repo_id}{revision}'
    label = "model.pretrained_cfg['label_names'][index]" if student.get('class_names') else 'int(index)'
    snippet = f"""\
import timm
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open('image.jpg').convert('{"L" if channels == 1 else "RGB"}')).unsqueeze(0)
with torch.inference_mode():
    probabilities = model(image).softmax(dim=-1)[0]
for probability, index in zip(*probabilities.topk({min(5, student["num_classes"])})):
    print(f'{{100 * probability:.1f}} %', {label})"""
    return (
        f'## Use\n\n```python\n{snippet}\n```\n\n'
        f'Images are {channels} x {height} x {width}, normalized with mean {_numbers(config["mean"])} and standard '
        f'deviation {_numbers(config["std"])}; for evaluation they are resized with {config["interpolation"]} '
        f'interpolation and cropped ({config["crop_mode"]}, {config["crop_pct"]:g}). The transform above does all '
        'that.\n\n'
        f'As the teacher of another student: `train-kd DATA --model MODEL --teacher {name}`.'
    )


def _training(run: Run, has_curves: bool) -> str:
    record = run.record
    versions = ', '.join(f'{package} {record[key]}' for package, key in (
        ('timm-kd', 'timm_kd'), ('timm', 'timm'), ('PyTorch', 'torch'),
    ))
    text = (
        f'## Training\n\n```sh\n{scrub_command(record["command"])}\n```\n\n'
        f'With {versions}. `args.yaml` holds every flag, `summary.csv` every epoch; both are in this repository.'
    )
    return text + ('\n\n![Loss and accuracy over the epochs](curves.png)' if has_curves else '')


def _citations(run: Run) -> str:
    loss = run.record.get('loss')
    papers = [_TIMM]
    if loss:
        knobs = KD_LOSSES[loss['name']].knobs()
        switched_on = [knob.metadata['citation'] for knob in knobs if loss['parameters'].get(knob.name) is True]
        papers = [*KD_LOSSES[loss['name']].stated(bool(_teachers(run))).citations, *switched_on, _TIMM]
    return '## Citation\n\n```bibtex\n' + '\n\n'.join(papers) + '\n```'


def _teachers(run: Run) -> list[dict[str, Any]]:
    return run.record.get('teacher') or []


def _teacher_name(teacher: dict[str, Any]) -> str:
    """The teacher's Hub id, or its file or folder without the local path."""
    return _hub_id(teacher['source']) or scrub(teacher['source']).removeprefix('local-dir:')


def _teacher_link(teacher: dict[str, Any]) -> str:
    name, model = _teacher_name(teacher), teacher['model']
    text = f'`{name}`' if model in name else f'`{model}` (`{name}`)'
    return f'[{text}]({_HUB}/{name})' if _hub_id(teacher['source']) else text


def _hub_id(source: str | None) -> str | None:
    """`owner/name` of `hf-hub:owner/name@revision` or of a timm model name; None of anything else."""
    if not source:
        return None
    if source.startswith(('hf-hub:', 'hf_hub:')):
        return source[len('hf-hub:'):].split('@')[0]
    return get_pretrained_cfg(source).hf_hub_id if is_model(source) else None


def _hub_dataset(run: Run) -> str | None:
    """The data set's id where timm read it from the Hub (`--dataset hfds/owner/name`)."""
    dataset = run.args.get('dataset') or ''
    return dataset.removeprefix('hfds/') if dataset.startswith('hfds/') else None


def _dataset_name(run: Run, publication: Publication) -> str:
    local = scrub(str(run.args.get('data_dir') or run.args.get('data') or run.args.get('dataset') or 'unnamed'))
    return publication.dataset or _hub_dataset(run) or local


def _title(publication: Publication) -> str:
    return publication.repo_id.split('/')[-1]


def _percent(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'


def _numbers(values: list[float]) -> str:
    return '(' + ', '.join(f'{value:g}' for value in values) + ')'
