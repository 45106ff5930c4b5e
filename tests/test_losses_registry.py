"""A sixth loss: its file and a line in the registry are all that flags, training, run.json and model card ask for."""
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from sixth_loss import LogitRegressionLoss

from timm_kd.cli import build_parser, parse_args
from timm_kd.hub import push_run
from timm_kd.losses import KD_LOSSES, create_kd_loss


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KD_LOSSES, 'logits', LogitRegressionLoss)


@pytest.fixture
def refuse(tmp_path, refusal):
    return lambda *argv: refusal([str(tmp_path), '--teacher', 'resnet34', *argv])


def test_the_formula_alone_trains_and_gives_the_gradient_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    kd_loss = create_kd_loss('logits', scale=3.0, temperature=1.0)
    result = kd_loss(student.requires_grad_(), teacher, torch.arange(4) % 3)
    result['kd_loss'].backward()
    torch.testing.assert_close(student.grad, 3.0 * (student - teacher).detach() / 4)
    assert not result['largest'].requires_grad


def test_it_is_trained_by_the_script_and_its_card_is_written(train, digits_teacher):
    run = train(f'--teacher {digits_teacher} --kd-loss logits --kd-scale 0.25 --epochs 4 --stop-epoch 1')
    assert run.record['loss'] == {
        'name': 'logits', 'parameters': {'scale': 0.25, 'temperature': 2.0}, 'task_loss_weight': 0.25,
        'distill_loss_weight': 0.5, 'warmup_epochs': 2,
    }
    row, = run.rows
    assert row['train_largest'] > 0
    expected = 0.25 * row['train_task_loss'] + 0.5 * 0.5 * row['train_kd_loss']  # the first of two epochs of warm-up
    assert row['train_loss'] == pytest.approx(expected, rel=1e-5)
    card = ModelCard.load(Path(push_run(run.folder, 'me/x', dry_run=True)) / 'README.md')
    assert 'Logit regression: the training loss is the weighted sum of the task loss and\n\n$$' in card.text
    assert LogitRegressionLoss.paper.formula in card.text and 'arXiv:1312.6184' in card.text
    assert '| scale, s, factor of the squared distance | 0.25 |' in card.text
    assert 'logits' in card.data.tags


def test_its_flags_are_in_the_help_with_its_defaults():
    text = ' '.join(build_parser().format_help().split())
    assert '--kd-scale X s, factor of the squared distance (unset: logits 0.1)' in text
    assert 'kd 4, dkd 4, nkd 1, tfkd 20, logits 2' in text
    assert 'unset: dkd 1/12 of --epochs, at least 1, logits 1/2 of --epochs, at least 1; else 0' in text


def test_the_range_of_its_knob_stands_at_the_flag(refuse):
    error = refuse('--kd-loss', 'logits', '--kd-scale', '0')
    assert error.startswith('train-kd: error: --kd-scale 0') and 'above 0' in error


def test_a_range_narrower_than_that_of_other_losses_holds_for_it_alone(refuse, tmp_path):
    error = refuse('--kd-loss', 'logits', '--kd-temperature', '9')
    assert '--kd-loss logits: temperature must be a value above 0 and of at most 8, got 9.0.' in error
    args, _ = parse_args([str(tmp_path), '--teacher', 'resnet34', '--kd-loss', 'kd', '--kd-temperature', '9'])
    assert args.kd_temperature == 9


def test_its_flag_is_no_parameter_of_another_loss(refuse):
    assert '--kd-scale 2.0: no parameter of nkd' in refuse('--kd-loss', 'nkd', '--kd-scale', '2')
