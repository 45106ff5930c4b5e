"""Images with several labels, or none: `--task multilabel`."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import STILL, Run, run_script
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from timm.data import ImageDataset, MultiLabelTarget, create_loader, resolve_model_data_config
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.loss import MULTI_LABEL_LOSS_TYPES, compute_class_weights, create_classification_loss
from timm.models import load_state_dict
from timm.utils import AverageMeter, random_seed

import timm_kd.data
from timm_kd.cli import parse_args
from timm_kd.hub import push_run
from timm_kd.report.__main__ import main as report

SHIM = Path(__file__).with_name('timm_shim')
NAMES = [*map(str, range(10)), 'even', 'above 6']
FLAGS = '--dataset hfds/digits --task multilabel --num-classes 12'
CPU = torch.device('cpu')


def labels_of(digit: int) -> list[int]:
    """The digit but for 0, whether it is even, whether it is above 6: 1 has one label, 8 three."""
    return [*([digit] if digit else []), *([10] if digit and digit % 2 == 0 else []), *([11] if digit > 6 else [])]


class LabelledDigits(ReaderImageFolder):
    """timm's reader of the digits' folder, with the labels that a data set of the Hub would have."""

    def __init__(self, root: Path, dense: bool = False):
        super().__init__(str(root))
        self.dense = dense
        self.class_to_idx = {} if dense else {name: index for index, name in enumerate(NAMES)}

    def __getitem__(self, index: int) -> tuple[io.BufferedReader, list[int]]:
        file, digit = super().__getitem__(index)
        labels = labels_of(digit)
        return file, [int(label in labels) for label in range(len(NAMES))] if self.dense else labels


@pytest.fixture(autouse=True)
def labelled(digits, monkeypatch):
    """Let `--dataset hfds/digits` be the digits with their labels; the package `datasets` need not be there."""
    def create(name, split, target_format=None, target_transform=None, **options):
        assert name == 'hfds/digits'
        reader = LabelledDigits(digits / split, dense=target_format == 'multihot')
        return ImageDataset(None, reader=reader, target_transform=target_transform)

    monkeypatch.setattr(timm_kd.data, 'create_dataset', create)


@pytest.fixture
def train_labels(tmp_path):
    def run(flags: str, name: str = 'run') -> Run:
        finished = run_script(f'{FLAGS} {flags}', Path(''), tmp_path, name)
        assert finished.exit_code == 0, finished.error
        return finished
    return run


def test_metrics_are_those_of_scikit_learn(train_labels, digits):
    run = train_labels('--epochs 2 --multilabel-threshold 0.3')
    model = timm.create_model('test_resnet', num_classes=12).eval()
    model.load_state_dict(load_state_dict(str(run.folder / 'last.pth.tar')))
    dataset = ImageDataset(None, reader=LabelledDigits(digits / 'validation'), target_transform=MultiLabelTarget(12))
    config = resolve_model_data_config(model)
    config = {name: config[name] for name in ('mean', 'std', 'interpolation', 'crop_pct')}
    loader = create_loader(dataset, (3, 32, 32), 50, **config, num_workers=0, device=CPU)
    with torch.no_grad():
        output, target = (torch.cat(parts).numpy() for parts in zip(*((model(x), y) for x, y in loader), strict=True))
    known = target.any(axis=0)  # label 0 has no image, and timm counts it as an average precision of 0
    assert known.sum() == 11
    row, predicted = run.rows[-1], 1 / (1 + np.exp(-output)) >= 0.3
    precision = average_precision_score(target[:, known], output[:, known], average='macro') * 11 / 12
    assert row['eval_map'] == pytest.approx(100 * precision, abs=1e-3)
    for name, average in ('micro', 'micro'), ('macro', 'macro'), ('sample', 'samples'):
        expected = 100 * f1_score(target, predicted, average=average, zero_division=0)
        assert row[f'eval_{name}_f1'] == pytest.approx(expected, abs=1e-3)
    assert list(row) == ['epoch', 'train_loss', 'eval_loss', 'eval_map', 'eval_micro_f1', 'eval_macro_f1',
                         'eval_sample_f1', 'lr']
    assert run.record['eval_metric'] == 'map'


POSITIVES = [16 * sum(label in labels_of(digit) for digit in range(10)) for label in range(12)]


@pytest.mark.parametrize('flags, arguments', [
    *((f'--loss {loss}', dict(loss_type=loss)) for loss in MULTI_LABEL_LOSS_TYPES if loss != 'db'),
    ('', {}),
    ('--smoothing 0.1', dict(smoothing=0.1)),
    ('--bce-loss --bce-pos-weight 2 --bce-sum', dict(pos_weight=2.0, bce_sum=True)),
    ('--loss asl --asl-gamma-neg 2 --asl-clip 0 --asl-reduction mean --loss-class-weight 1,1,1,1,1,1,1,1,1,1,2,3',
     dict(loss_type='asl', asl_gamma_neg=2.0, asl_clip=0.0, asl_reduction='mean', class_weight=[1.0] * 10 + [2, 3])),
    ('--loss poly --poly-gamma 2 --poly-alpha 0.3', dict(loss_type='poly', poly_gamma=2.0, poly_alpha=0.3)),
    ('--loss db --class-stats {stats} --db-neg-scale 3',
     dict(loss_type='db', class_counts=POSITIVES, num_samples=160, db_neg_scale=3.0)),
    ('--class-stats {stats} --loss-pos-weight neg_pos --loss-weight-power 0.5',
     dict(pos_weight=compute_class_weights(POSITIVES, 160, power=0.5)[1])),
    ('--target-format multihot', {}),
])
def test_train_loss_is_timms_on_the_same_batches(flags, arguments, train_labels, digits, tmp_path):
    (tmp_path / 'stats.json').write_text(json.dumps({'pos_counts': POSITIVES, 'num_samples': 160}))
    run = train_labels(f'--no-aug {STILL} {flags}'.replace('{stats}', str(tmp_path / 'stats.json')))
    random_seed(42, 0)
    model = timm.create_model('test_resnet', num_classes=12).train()
    dataset = ImageDataset(None, reader=LabelledDigits(digits / 'train'), target_transform=MultiLabelTarget(12))
    loader = create_loader(dataset, (3, 32, 32), 32, is_training=True, no_aug=True, interpolation='bicubic',
                           mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0, device=CPU)
    criterion, meter = create_classification_loss(multi_label=True, **arguments), AverageMeter()
    for input, target in loader:
        meter.update(criterion(model(input), target).item(), len(target))
    assert run.rows[0]['train_loss'] == pytest.approx(meter.avg, rel=1e-6)


@pytest.mark.parametrize('metric, better', [('map', max), ('macro_f1', max), ('loss', min)])
def test_best_checkpoint_is_that_of_the_metric(metric, better, train_labels):
    run = train_labels(f'--epochs 4 --lr 1e-2 --eval-metric {metric}')
    values = [row[f'eval_{metric}'] for row in run.rows]
    best = values.index(better(values))
    assert run.checkpoint('model_best.pth.tar')['epoch'] == best
    assert run.record['best'] == {'epoch': best, 'metric': values[best]}


@pytest.mark.parametrize('flags', [
    '--mixup 0.4 --cutmix 0.5 --smoothing 0.1', '--mixup 0.4 --no-prefetcher --mixup-mode elem --tta 2',
    '--aug-splits 2 --aa rand-m3', '--replayable-data --crops-per-image 2 --model-ema --model-ema-decay 0.5',
])
def test_resumed_run_ends_as_the_whole_one(flags, train_labels):
    whole = train_labels(f'--epochs 2 {flags}', 'whole')
    train_labels(f'--epochs 2 --stop-epoch 1 {flags}', 'parts')
    assert train_labels(f'--epochs 2 --resume auto {flags}', 'parts').rows == whole.rows


def test_validation_lines_hold_the_loss_alone(train_labels):
    lines = [line for line in train_labels('').log if line.startswith('Test:')]
    assert lines and all('Loss:' in line and 'Acc@1' not in line for line in lines)


@pytest.mark.parametrize('flags, sentence', [
    ('--num-classes 11', '--num-classes 11'),
    ('--num-classes 11 --target-format multihot', '--target-format'),
    ('--loss-class-weight 1,2,3', '--loss-class-weight 1,2,3: has 3 entries but the model has 12 classes'),
    ('--loss-pos-weight {weights}', '--loss-pos-weight {weights}: has 3 entries but the model has 12 classes'),
    ('--loss db --class-stats {stats}', '--class-stats {stats}: has 2 entries but the model has 12 classes'),
])
def test_labels_and_weights_of_another_number_are_refused(flags, sentence, tmp_path):
    stats, weights = tmp_path / 'stats.json', tmp_path / 'weights.json'
    stats.write_text('{"pos_counts": [1, 2], "num_samples": 4}')
    weights.write_text('{"pos_weight": [1, 2, 3]}')
    flags, sentence = (text.format(stats=stats, weights=weights) for text in (flags, sentence))
    run = run_script(f'{FLAGS} {flags}', Path(''), tmp_path)
    assert run.exit_code == 2 and sentence in run.error and run.error.count('\n') == 1, run.error
    assert not run.folder.exists()


def test_label_that_breaks_off_a_run_is_named_in_a_sentence(tmp_path, monkeypatch):
    late = LabelledDigits.__getitem__
    monkeypatch.setattr(LabelledDigits, '__getitem__', lambda reader, index: (late(reader, index)[0], [99])
                        if index == 7 else late(reader, index))
    run = run_script(f'{FLAGS} --workers 1', Path(''), tmp_path)
    assert run.exit_code == 1 and 'an image has the labels [99]' in run.error and run.error.count('\n') == 1


def test_report_compares_in_the_metric_of_the_runs(train_labels, capsys):
    run = train_labels('--eval-metric micro_f1')
    assert report([str(run.folder)]) == 0
    table = capsys.readouterr().out
    assert 'best micro_f1' in table and f'{run.rows[0]["eval_micro_f1"]:.2f}' in table


def test_card_has_the_figures_of_several_labels(train_labels):
    run = train_labels('--model-ema')
    folder = Path(push_run(run.folder, 'me/labels', dry_run=True))
    card = (folder / 'README.md').read_text()
    assert f'| {run.rows[0]["eval_map"]:.2f} |' in card and 'mAP (%)' in card and 'Top-1' not in card
    assert '.sigmoid()[0]' in card and 'softmax' not in card
    assert json.loads((folder / 'config.json').read_text())['label_names'] == NAMES


def test_flags_of_the_loss_come_out_as_one(tmp_path):
    args, text = parse_args([*FLAGS.split(), '--device', 'cpu', '--bce-loss', '--bce-pos-weight', '2'])
    assert (args.loss, args.loss_pos_weight, args.smoothing, args.eval_metric) == ('bce', '2.0', 0.0, 'map')
    (tmp_path / 'args.yaml').write_text(text)
    again, _ = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert vars(again) == vars(args)


def parquet(folder: Path) -> Path:
    """Write digits as a data set of the Hub: an image and a field for each of two labels."""
    datasets = pytest.importorskip('datasets')
    rows = {'image': [], 'bright': [], 'wide': []}
    for index in range(32):
        data = io.BytesIO()
        Image.new('RGB', (32, 32), (index * 8,) * 3).save(data, format='PNG')
        rows['image'].append({'bytes': data.getvalue(), 'path': f'{index}.png'})
        rows['bright'].append(index > 15)
        rows['wide'].append(index % 2)
    features = datasets.Features(
        {'image': datasets.Image(), 'bright': datasets.Value('bool'), 'wide': datasets.Value('int64')})
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f'{split}.parquet'))
    return folder


@pytest.mark.parametrize('reader', ['hfds', 'hfids'])
@pytest.mark.parametrize('further', ['', '--naflex-loader'])
def test_fields_of_a_hub_data_set_are_labels(reader, further, tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = parquet(tmp_path / 'bright')
    model = '--model naflexvit_base_patch16_gap --model-kwargs embed_dim=32 depth=1 num_heads=2 --naflex-loader ' \
            '--naflex-train-seq-lens 4 9 --naflex-max-seq-len 9 --mixup 0.2' if further else ''
    if reader == 'hfids' and further:
        pytest.skip('streams have no NaFlex loader')
    flags = f'--dataset {reader}/{folder} --target-key bright,wide --task multilabel --num-classes 2 {model}'
    cache = tmp_path / 'cache'  # of the package `datasets`
    run = run_script(f'{flags} --batch-size 8 --train-num-samples 32 --val-num-samples 32', cache, tmp_path)
    assert run.exit_code == 0, run.error
    assert 0 < run.rows[0]['eval_map'] <= 100


def test_field_that_is_not_there_is_refused(tmp_path, monkeypatch):
    def without_labels(reader, index):
        raise KeyError('tags')

    monkeypatch.setattr(LabelledDigits, '__getitem__', without_labels)
    run = run_script(f'{FLAGS} --target-key tags', Path(''), tmp_path)
    assert run.exit_code == 2, run.error
    assert run.error.endswith(": --target-key tags: the images of --dataset hfds/digits have no field 'tags'.\n")


@pytest.mark.soak
@pytest.mark.skipif('TIMM_TESTS' not in os.environ, reason='TIMM_TESTS=path/to/tests of timm is not set')
def test_timms_own_tests_of_its_script_pass_on_ours():
    pytest.importorskip('datasets')
    tests = Path(os.environ['TIMM_TESTS']).resolve()
    path = os.pathsep.join([str(SHIM), str(SHIM.parents[1]), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--import-mode=append', '-k', 'resume or cli',
         'test_train_resume.py', 'test_multilabel.py'],
        cwd=tests, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True)
    assert done.returncode == 0 and 'passed' in done.stdout, done.stdout
