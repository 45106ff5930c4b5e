"""The flags of knowledge distillation, timm's own among them, and what else this script adds to timm's."""
from ..losses import KD_LOSSES
from .parser import Flag, flag, kwargs_flag, switch

KD_FLAGS: dict[str, list[Flag]] = {
    'Knowledge distillation parameters': [
        flag(
            '--kd-loss', type=str, choices=tuple(KD_LOSSES),
            help='distillation loss (kd beside a teacher when unset); without it and a teacher: plain training',
        ),
        flag(
            '--teacher', action='append', type=str, metavar='SPEC',
            help='teacher: a timm name, hf-hub:org/name, local-dir:PATH, a folder, or a weights file (with '
                 '--teacher-model); given several times, the mean of their probabilities teaches',
        ),
        flag('--teacher-model', type=str, metavar='NAME', help='timm architecture of a teacher that is a weights file'),
        kwargs_flag('--teacher-kwargs', help='further keyword arguments of the teacher model'),
        flag('--teacher-img-size', type=int, help='input size of the teacher in pixels (the student\'s when unset)'),
        flag(
            '--teacher-dtype', type=str, default='auto', choices=('auto', 'amp', 'float32', 'bfloat16', 'float16'),
            help='precision of the teacher; auto: bfloat16 where it is fast; amp: inside the autocast of the student',
        ),
        switch('--teacher-ema', help='take the moving average weights out of a checkpoint that has them'),
        flag(
            '--teacher-class-map', type=str, metavar='FILE',
            help='file with the teacher\'s index of each student class, or imagenet12k, imagenet21k, imagenet22k, '
                 'imagenet22k_ms',
        ),
        flag(
            '--teacher-class-map-missing', type=str, default='error', choices=('error', 'mask'),
            help='classes the teacher lacks: refuse them, or leave their images without distillation',
        ),
        switch('--no-teacher-eval', help='do not validate the teacher at start (and report no agreement)'),
        flag('--task-loss-weight', type=float, help='weight of the task loss (unset: what suits the loss)'),
        flag('--distill-loss-weight', type=float, help='weight of the distillation loss (unset: what suits the loss)'),
        flag('--kd-temperature', type=float, help='temperature (the default of the loss when unset)'),
        flag('--kd-alpha', type=float, help='dkd: weight of the target class part'),
        flag('--kd-beta', type=float, help='dkd: weight of the non-target part'),
        flag('--kd-gamma', type=float, help='nkd: weight of the distributed part'),
        flag('--kd-correct-prob', type=float, help='tfkd: probability the virtual teacher gives the right class'),
        switch('--kd-logit-std', help='kd, dkd, nkd: standardise the logits of each row (Sun et al. 2024)'),
        flag(
            '--kd-warmup-epochs', type=int,
            help='epochs over which the distillation loss is faded in (unset: a twelfth of --epochs for dkd, at least '
                 '1, and none for the other losses)',
        ),
        flag('--teacher-cache', type=str, metavar='DIR', help='store the teacher\'s logits here, and read them again'),
        flag(
            '--teacher-cache-dtype', type=str, default='float16', choices=('float16', 'float32'),
            help='precision of stored logits',
        ),
        flag('--teacher-cache-epochs', type=int, help='distinct epochs to store, then round again (unset: all)'),
        flag(
            '--teacher-cache-topk', type=int,
            help='store only the k largest logits of a row, and the rest as one sum',
        ),
        switch('--teacher-cache-rebuild', help='throw away what is stored, should it not fit this run'),
        flag('--kd-model-name', type=str, metavar='NAME', help='teacher as timm\'s script takes it, with its defaults'),
        flag(
            '--kd-distill-type', type=str, default='logit', choices=('logit', 'feature', 'token'),
            help='logit (timm\'s feature and token distillation are refused)',
        ),
        flag('--kd-loss-type', type=str, metavar='NAME', default='kl', help='kl (see --kd-loss)'),
        flag('--kd-student-feature-dim', type=int, help='refused (feature distillation)'),
        flag('--kd-teacher-feature-dim', type=int, help='refused (feature distillation)'),
        flag(
            '--kd-token-distill-type', type=str, default='soft', choices=('soft', 'hard'),
            help='refused (token distillation)',
        ),
    ],
    'Additions to timm\'s script': [
        switch(
            '--replayable-data',
            help='make order, augmentation and mixing functions of seed, epoch and sample, whatever the workers: '
                 'resume is exact at any step',
        ),
        flag(
            '--push-to-hub', type=str, metavar='REPO_ID',
            help='push the best checkpoint to the Hugging Face Hub at the end (token: HF_TOKEN or hf auth login)',
        ),
        switch('--hub-private', help='make a private repository'),
        flag('--hub-license', type=str, metavar='ID', help='license that the model card names (unset: none)'),
        flag('--hub-revision', type=str, metavar='BRANCH', help='branch to push to (the main one when unset)'),
        switch('--log-tensorboard', help='log to TensorBoard, in the folder of the run'),
    ],
}
