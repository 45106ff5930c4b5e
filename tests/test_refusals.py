"""Command lines refused by their flags alone, before anything is read or built: one line that names flag and value."""
import shlex

import pytest

from timm_kd.train import main

REFUSED = [
    # the flags of timm
    # unknown and misspelt
    ('--kd-lose nkd', '--kd-lose', '--kd-loss'),
    ('--opt adamv', '--opt adamv', 'adam'),
    ('--sched cosin', '--sched cosin', 'cosine'),
    ('--aa rnd-m9', '--aa rnd-m9'),
    ('--eval-metric top-1', '--eval-metric top-1', 'top1'),
    ('--interpolation bicubik', '--interpolation bicubik', 'bicubic'),
    ('--amp-dtype fp16', '--amp-dtype fp16', 'float16'),
    ('--opt-kwargs caution', '--opt-kwargs', 'caution'),
    ('--opt-kwargs cautoin=True', '--opt-kwargs', 'cautoin'),
    ('--opt-kwargs lr=0.1', '--opt-kwargs lr=0.1', '--lr'),
    # out of range
    ('--batch-size 0', '--batch-size 0'),
    ('--epochs 0', '--epochs 0'),
    ('--log-interval 0', '--log-interval 0'),
    ('--lr -0.1', '--lr -0.1'),
    ('--lr nan', '--lr nan'),
    ('--weight-decay inf', '--weight-decay inf'),
    ('--smoothing 1.0', '--smoothing 1.0'),
    ('--reprob 25', '--reprob 25.0'),
    ('--seed -1', '--seed -1'),
    ('--opt adamw --opt-betas 0.9 1.5', '--opt-betas', '1.5'),
    ('--scale 1.0 0.08', '--scale 1.0 0.08'),
    ('--cutmix-minmax 0.5', '--cutmix-minmax 0.5'),
    ('--sched wsd --epochs 10 --decay-epochs 20', '--decay-epochs 20', '--sched wsd', 'length 5'),
    ('--sched wsd --epochs 3', '--sched wsd', '--epochs 3', '--warmup-epochs 5', '--warmup-prefix'),
    ('--sched rsqrt --epochs 7', '--sched rsqrt', '--epochs 7', 'without', '--decay-epochs'),
    ('--sched rsqrt --warmup-epochs 0', '--sched rsqrt', '--warmup-epochs', '--lr-stable-timescale'),
    (
        '--epochs 2 --warmup-epochs 0 --lr-cycle-limit 3 --lr-cycle-mul 0.5 --cooldown-epochs 1',
        '--cooldown-epochs 1', '--lr-cycle-mul 0.5',
    ),
    ("--opt ''", "--opt ''"),
    (f'--epochs {"9" * 400}', '--epochs 999', '63 bits'),
    ('--layer-decay -1', '--layer-decay -1.0'),
    ('--sched step --decay-rate 1e300', '--sched step', '--decay-rate 1e+300'),
    ('--lr-cycle-mul 1e10 --lr-cycle-limit 400', '--lr-cycle-mul 1', '--lr-cycle-limit 400'),
    ('--train-img-sizes 32 64 --train-size-probs 0 0', '--train-size-probs 0.0 0.0'),
    ('--train-img-sizes 32 64 --train-batch-sizes 8 9 --mixup 1', '--train-batch-sizes 8 9'),
    ('--sched plateau --decay-rate 1', '--sched plateau', '--decay-rate 1.0'),
    ('--stop-epoch 301', '--stop-epoch 301', '--epochs 300', '300 epochs'),
    ('--epochs 10 --cooldown-epochs 2 --stop-epoch 13', '--stop-epoch 13', '12 epochs'),
    ('--lr-noise 0.5 --lr-noise-pct 0', '--lr-noise-pct 0.0', 'above 0'),
    ('--lr-decay-fn sqrt', '--lr-decay-fn sqrt', '1-sqrt'),
    ('--lr-k-decay -1', '--lr-k-decay -1'),
    ('--tta 3 -b 16', '--tta 3', '--batch-size 16', 'a multiple'),
    ('--sched step --decay-epochs 0', '--sched step', '--decay-epochs 0'),
    ('--opt adamw --opt-betas 0.9', '--opt-betas 0.9', '--opt adamw'),
    # not there
    ('--resume gone.pth.tar', '--resume gone.pth.tar'),
    ('--initial-checkpoint gone.pth', '--initial-checkpoint gone.pth'),
    ('--pretrained-path gone.pth', '--pretrained-path gone.pth'),
    ('--class-map gone.txt', '--class-map gone.txt'),
    ('--class-map /', '--class-map /', 'folder'),
    ('--pretrained-path {file}', '--pretrained-path', '{file}', '--pretrained,'),
    ('--config gone.yaml', '--config gone.yaml', 'no such file'),
    ('--config resnet18_r34_nk', '--config resnet18_r34_nk', 'resnet18_r34_nkd'),
    ('--config /gone/resnet18_r34_nkd', '--config /gone/resnet18_r34_nkd'),
    ('--resume auto', '--resume auto needs --experiment'),
    # clashes
    ('--data-dir /', '--data-dir /'),
    ('--aug-splits 1', '--aug-splits 1'),
    ('--aug-splits 3 --no-prefetcher', '--aug-splits 3', '--no-prefetcher'),
    ('--split-bn --resplit -b 15', '--batch-size 15', '--split-bn'),
    ('--jsd-loss', '--jsd-loss compares', '--aug-splits'),
    ('--loss jsd', 'error: --loss jsd compares', '--aug-splits'),
    ('--loss jsd --aug-splits 3 --kd-loss tfnkd', 'error: --loss jsd', '--kd-loss tfnkd'),
    ('--bce-loss --loss ce', '--bce-loss', '--loss ce'),
    ('--torchcompile indctor', '--torchcompile indctor', 'inductor'),
    ('--torchcompile --torchcompile-mode fast', '--torchcompile-mode fast', 'max-autotune'),
    ('--device cuda --torchcompile --torchcompile-mode reduce-overhead --grad-accum-steps 2',
     '--torchcompile-mode reduce-overhead --grad-accum-steps 2', 'max-autotune-no-cudagraphs'),
    ('--torchcompile-mode default', '--torchcompile-mode default', '--torchcompile,'),
    ('--amp --model-dtype bfloat16', '--model-dtype bfloat16', '--amp'),
    ('--torchscript --torchcompile', '--torchscript', '--torchcompile'),
    ('--lr-decay-fn cosine', '--lr-decay-fn cosine', '--sched wsd'),
    ('--sched plateau --sched-on-updates', '--sched-on-updates'),
    ('--train-batch-sizes 8 16', '--train-batch-sizes 8 16', '--train-img-sizes'),
    ('--train-img-sizes 32 --train-size-probs 0.5 0.5', '--train-size-probs'),
    ('--hub-private', '--hub-private', '--push-to-hub'),
    ('--push-to-hub https://huggingface.co/me/x', '--push-to-hub'),
    # not this project's
    ('--naflex-loader', '--naflex-loader: NaFlex data is not supported'),
    ('--task multilabel', 'one class', '--task multilabel: multi-label training is not supported'),
    ('--target-key a,b', '--target-key a,b', 'multi-label'),
    ('--loss asl', '--loss asl', 'ce, bce, jsd'),
    ('--kd-distill-type feature', '--kd-distill-type feature', 'not supported'),
    ('--kd-distill-type token', '--kd-distill-type token', 'not supported'),
    ('--kd-loss-type mse', '--kd-loss-type mse'),
    ('--kd-student-feature-dim 64', '--kd-student-feature-dim 64'),
    ('--kd-token-distill-type hard', '--kd-token-distill-type hard'),
    ('--naflex-max-seq-len 99', '--naflex-max-seq-len 99: NaFlex data is not supported'),
    ('--target-format multihot', '--target-format multihot: multi-label'),
    # distillation
    ('--kd-loss kd', '--kd-loss kd needs a teacher', '--teacher SPEC', 'tfnkd'),
    ('--kd-loss nkd', 'tfnkd', '--kd-loss nkd needs a teacher', '--teacher SPEC'),
    ('--kd-loss tfnkd --teacher resnet34', '--teacher resnet34', '--kd-loss tfnkd'),
    ('--kd-loss tfnkd --kd-model-name resnet34', '--kd-model-name resnet34', '--kd-loss tfnkd'),
    ('--kd-loss mse --teacher resnet34', '--kd-loss', 'mse', 'nkd'),
    ('--kd-model-name resnet50 --teacher resnet34', '--kd-model-name resnet50', '--teacher resnet34'),
    ('--kd-loss tfkd --kd-logit-std', '--kd-logit-std', 'tfkd'),
    ('--kd-loss tfkd --teacher resnet34 --kd-correct-prob 0.9', '--kd-correct-prob 0.9', '--teacher resnet34'),
    ('--kd-loss tfkd --kd-correct-prob 1.5', '--kd-correct-prob 1.5'),
    ('--kd-loss tfkd --kd-correct-prob 0', '--kd-correct-prob 0.0'),
    ('--teacher resnet34 --kd-temperature 0', '--kd-temperature 0.0', 'above 0'),
    ('--teacher resnet34 --kd-temperature -1', '--kd-temperature -1.0', 'above 0'),
    ('--teacher resnet34 --distill-loss-weight -1', '--distill-loss-weight -1.0'),
    ('--teacher resnet34 --task-loss-weight 2', '--task-loss-weight 2.0', '--distill-loss-weight'),
    ('--teacher resnet34 --task-loss-weight 0 --distill-loss-weight 0', '--task-loss-weight 0'),
    ('--teacher resnet34 --kd-warmup-epochs -1', '--kd-warmup-epochs -1'),
    ('--teacher resnet34 --num-classes 1', '--num-classes 1'),
    # nothing to act on
    ('--kd-warmup-epochs 2', '--kd-warmup-epochs 2', '--teacher'),
    ('--kd-alpha 2', '--kd-alpha 2.0', '--teacher'),
    ('--distill-loss-weight 1', '--distill-loss-weight 1.0'),
    ('--teacher-model resnet34', '--teacher-model resnet34', '--teacher SPEC'),
    ('--no-teacher-eval', '--no-teacher-eval', 'add --teacher SPEC'),
    ('--kd-loss tfnkd --teacher-dtype float32', '--teacher-dtype float32', '--teacher SPEC'),
    ('--kd-loss tfnkd --teacher-cache logits', '--teacher-cache logits', '--teacher SPEC'),
    ('--teacher resnet34 --teacher-model resnet34', '--teacher-model resnet34', '--teacher resnet34'),
    ('--teacher resnet34 --teacher-ema', '--teacher-ema', '--teacher resnet34'),
    ('--teacher resnet34 --teacher-dtype amp', '--teacher-dtype amp', '--amp'),
    ('--teacher resnet34 --teacher-class-map-missing mask', '--teacher-class-map-missing mask', '--teacher-class-map'),
    ('--teacher resnet34 --teacher-cache-epochs 3', '--teacher-cache-epochs 3', '--teacher-cache,'),
    # stored logits
    ('--teacher resnet34 --teacher-cache x --train-img-sizes 32 64', '--teacher-cache x', '--train-img-sizes'),
    ('--teacher resnet34 --teacher-cache x --aug-repeats 3', '--teacher-cache x', '--aug-repeats'),
    ('--teacher resnet34 --teacher-cache x --dataset wds/imagenet', '--teacher-cache x', 'wds/imagenet'),
    ('--teacher resnet34 --teacher-cache x --teacher-cache-topk 0', '--teacher-cache-topk 0'),
    ('--teacher resnet34 --kd-gamma 1', '--kd-gamma 1.0: no parameter of kd', '--kd-temperature'),
    ('--kd-loss nkd --teacher resnet34 --kd-alpha 2', '--kd-alpha 2.0: no parameter of nkd', '--kd-gamma'),
    ('--kd-loss tfnkd --kd-temperature 2', '--kd-temperature 2.0: no parameter of tfnkd'),
    ('--teacher resnet34 --kd-temperature nan', '--kd-temperature nan', 'finite'),
    ('--kd-temperature 2', '--kd-temperature 2.0', '--teacher', '--kd-loss'),
    ('--aug-splits 3 --teacher resnet34', '--aug-splits 3: does not go with distillation', '--kd-loss kd'),
    ('--aug-splits 3 --jsd-loss --kd-loss tfnkd', '--jsd-loss', '--kd-loss tfnkd'),
]


@pytest.mark.parametrize('case', REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_in_one_line_that_names_flag_and_value(case, tmp_path, capsys):
    flags, *names = (text.replace('{file}', __file__) for text in case)
    (tmp_path / 'data').mkdir()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / 'data'), '--output', str(tmp_path / 'output'), *shlex.split(flags)])
    output, error = capsys.readouterr()
    assert stop.value.code == 2
    assert output == '' and error.startswith('train-kd: error: ') and error.count('\n') == 1
    assert [name for name in names if name not in error] == []
    assert not (tmp_path / 'output').exists()
