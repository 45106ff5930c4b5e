"""The flags of timm's training script, as a table.

Option strings, dests, types, defaults, nargs and choices are timm's (its script beside timm 1.0.31); the help texts are
this project's. Two defaults differ, on purpose: `decay_epochs` is None, so that timm's scheduler factory picks the
length that suits the schedule (90 for `step`, a fifth of the run for `wsd` and `rsqrt`), and `kd_temperature`
(in `kd_flags`) is None, the loss's own default.
"""
from timm.data.readers.targets import TARGET_FORMATS
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from .parser import Flag, count, flag, kwargs_flag, not_negative, number, one_of, positive, switch, whole
from .task_loss import LOSS_FLAGS

share, share_below_1 = number(float, at_least=0, at_most=1), number(float, at_least=0, below=1)

FILTERS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
METRICS = tuple(dict.fromkeys(
    (*ClassificationEvaluator.metric_names[1:], *MultiLabelClassificationEvaluator.metric_names)))
SINGLE_LABEL = ('classification', 'singlelabel', 'single-label', 'single_label', 'multiclass')

DATA = flag('data', nargs='?', metavar='DIR', help='data set folder (--data-dir says the same)')

TIMM_FLAGS: dict[str, list[Flag]] = {
    'Dataset parameters': [
        flag('--data-dir', metavar='DIR', help='data set folder, for those who prefer a flag to the positional'),
        flag(
            '--dataset', default='',
            help='kind and name of the data set, such as hfds/NAME, tfds/NAME, wds/NAME or torch/NAME; '
                 'empty: a folder with one sub-folder per class',
        ),
        flag('--train-split', default='train', help='split to train on'),
        flag('--val-split', default='validation', help='split to validate on'),
        flag('--train-num-samples', type=count, help='samples of the training split, where its reader cannot tell'),
        flag('--val-num-samples', type=count, help='samples of the validation split, where its reader cannot tell'),
        switch('--dataset-download', help='let torch/, hfds/ and tfds/ data sets download themselves'),
        flag('--class-map', type=str, metavar='FILE', default='', help='file that maps class names to class indices'),
        flag('--input-img-mode', type=str, metavar='MODE', help='PIL mode that images are converted to (RGB, L, ...)'),
        flag('--input-key', type=str, metavar='KEY', help='field of a sample that holds the image'),
        flag(
            '--target-key', type=str, metavar='KEY',
            help='field of a sample that holds the class; A,B,C: a field for each label (--task multilabel)',
        ),
        switch('--dataset-trust-remote-code', help='allow a Hugging Face data set to run code of its repository'),
        flag(
            '--target-format', known=('', *TARGET_FORMATS), metavar='FORMAT',
            help='how the labels of an image are listed (indices when unset; --task multilabel)',
        ),
    ],
    'Model parameters': [
        flag('--model', type=str, default='resnet50', help='name of the timm model to train'),
        switch('--pretrained', help='start from the pretrained weights of --model'),
        flag('--pretrained-path', type=str, metavar='FILE', help='take the pretrained weights from this file'),
        flag(
            '--initial-checkpoint', type=str, metavar='FILE', default='',
            help='load this checkpoint into the built model before training',
        ),
        flag(
            '--resume', type=str, metavar='FILE', default='',
            help='go on from this checkpoint, optimizer included; "auto": from the newest one of --experiment, in its '
                 'folder. Exact with --workers 0 or with --replayable-data, else exact from the start of an epoch',
        ),
        switch('--no-resume-opt', help='resume the model but not the optimizer'),
        flag('--num-classes', type=count, help='size of the head (the model default when unset)'),
        flag('--gp', type=str, metavar='TYPE', help='global pooling of the head: fast, avg, max, avgmax, avgmaxc'),
        flag('--img-size', type=count, help='side of square images in pixels'),
        flag('--in-chans', type=count, help='channels of an image'),
        flag(
            '--input-size', nargs=3, type=count, metavar='N',
            help='channels, height and width: --input-size 3 224 224',
        ),
        flag('--crop-pct', type=positive, help='share of the image that the validation centre crop keeps'),
        flag('--mean', type=float, nargs='+', help='mean that images are normalised with'),
        flag('--std', type=positive, nargs='+', help='standard deviation that images are normalised with'),
        flag('--interpolation', known=('', *FILTERS), default='', help='resize filter of validation images'),
        flag('-b', '--batch-size', type=count, default=128, help='training images per step and process'),
        flag('-vb', '--validation-batch-size', type=count, help='validation images per step (--batch-size when unset)'),
        switch('--channels-last', help='NHWC memory format for model and images'),
        flag('--fuser', known=('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'), default='', help='TorchScript fuser'),
        flag('--grad-accum-steps', type=count, default=1, help='batches whose gradients make one optimizer update'),
        switch('--grad-checkpointing', help='recompute activations in the backward pass to save memory'),
        switch('--fast-norm', help='let normalisation layers run in low precision under AMP'),
        kwargs_flag('--model-kwargs', help='further keyword arguments of the model'),
        flag('--head-init-scale', type=float, help='scale the initial weights of the head'),
        flag('--head-init-bias', type=float, help='initial bias of the head'),
        flag('--torchcompile-mode', type=str, metavar='MODE', help='mode handed to torch.compile'),
        switch('--torchscript', help='compile the model with TorchScript'),
        flag(
            '--torchcompile', nargs='?', type=str, metavar='BACKEND', const='inductor',
            help='compile student, teacher and loss with torch.compile; the backend is inductor unless named',
        ),
    ],
    'Device parameters': [
        flag('--device', type=str, default='cuda', help='device to train on; unset, the CPU where there is no GPU'),
        switch('--amp', help='train in mixed precision (torch.autocast)'),
        flag('--amp-dtype', known=('float16', 'bfloat16'), default='float16', help='low precision of --amp'),
        flag('--model-dtype', known=('float32', 'float16', 'bfloat16'), help='dtype of the model itself, without AMP'),
        switch('--no-ddp-bb', help='do not broadcast buffers in DistributedDataParallel'),
        switch('--synchronize-step', help='wait for the device after each step'),
        flag('--local_rank', type=whole, default=0, help='set by launchers of old; torchrun needs no flag'),
        flag(
            '--device-modules', type=str, nargs='+', metavar='MODULE',
            help='Python modules to import that register a device backend',
        ),
    ],
    'Optimizer parameters': [
        flag('--opt', type=str, default='sgd', help='optimizer; plain SGD with momentum is "momentum"'),
        flag('--opt-eps', type=float, help='epsilon of the optimizer'),
        flag('--opt-betas', type=float, nargs='+', help='betas of the optimizer'),
        flag('--momentum', type=not_negative, default=0.9, help='momentum, for optimizers that have one'),
        flag('--weight-decay', type=not_negative, default=2e-5, help='weight decay'),
        flag('--clip-grad', type=not_negative, help='limit for gradient clipping (none when unset)'),
        flag('--clip-mode', known=('norm', 'value', 'agc'), default='norm', help='what is clipped'),
        flag('--layer-decay', type=not_negative, help='factor on the learning rate from one layer to the next below'),
        flag('--layer-decay-min-scale', type=not_negative, default=0, help='least factor that --layer-decay may reach'),
        flag('--layer-decay-no-opt-scale', type=not_negative, help='layers whose factor is below this are frozen'),
        kwargs_flag('--opt-kwargs', help='further keyword arguments of the optimizer'),
    ],
    'Learning rate schedule parameters': [
        flag('--sched', known=SCHEDULES, default='cosine', help='schedule'),
        switch('--sched-on-updates', help='step the schedule at each update, not at each epoch'),
        flag('--lr', type=not_negative, help='learning rate; unset, it is made from --lr-base'),
        flag('--lr-base', type=not_negative, default=0.1, help='learning rate for --lr-base-size images a step'),
        flag('--lr-base-size', type=count, default=256, help='global batch size that --lr-base is meant for'),
        flag(
            '--lr-base-scale', known=('', 'linear', 'sqrt'), default='',
            help='how --lr-base grows with the batch (unset: as suits the optimizer)',
        ),
        flag(
            '--lr-noise', type=float, nargs='+',
            help='from where (and up to where) to add noise, as shares of the run',
        ),
        flag('--lr-noise-pct', type=positive, default=0.67, help='limit of the noise, as a share of the learning rate'),
        flag('--lr-noise-std', type=not_negative, default=1.0, help='standard deviation of the noise'),
        flag('--lr-cycle-mul', type=positive, default=1.0, help='factor on the length from cycle to cycle'),
        flag('--lr-cycle-decay', type=float, default=0.5, help='factor on the learning rate from cycle to cycle'),
        flag('--lr-cycle-limit', type=count, default=1, help='number of cycles'),
        flag('--lr-k-decay', type=not_negative, default=1.0, help='exponent of k-decay (cosine, poly)'),
        flag(
            '--lr-decay-fn', choices=('linear', '1-sqrt', 'cosine', 'power', 'exp'),
            help='shape of the decay phase of wsd and rsqrt (unset: 1-sqrt for wsd, linear for rsqrt)',
        ),
        flag('--lr-stable-timescale', type=positive, help='time scale of rsqrt in epochs (--warmup-epochs when unset)'),
        flag('--warmup-lr', type=not_negative, default=1e-5, help='learning rate that the warm-up starts from'),
        flag('--min-lr', type=not_negative, default=0, help='learning rate that cyclic schedules end at'),
        flag('--epochs', type=count, default=300, help='epochs of the schedule'),
        flag('--epoch-repeats', type=not_negative, default=0., help='passes over the data that count as one epoch'),
        flag('--start-epoch', type=whole, help='first epoch, in place of what a checkpoint says'),
        flag(
            '--stop-epoch', type=count,
            help='end the run after this many epochs; the schedule stays that of --epochs',
        ),
        flag(
            '--decay-milestones', type=whole, nargs='+', default=[90, 180, 270],
            help='multistep: epochs at which the rate drops; in timm, milestone m acts from epoch index m - 1',
        ),
        flag(
            '--decay-epochs', type=not_negative,
            help='step: epochs between drops (90 when unset); wsd, rsqrt: length of the decay, below 1 a share (0.2)',
        ),
        flag('--warmup-epochs', type=whole, default=5, help='epochs of linear warm-up'),
        switch('--warmup-prefix', help='warm up before the schedule, not inside it'),
        flag('--cooldown-epochs', type=whole, default=0, help='epochs at --min-lr after the schedule'),
        flag('--patience-epochs', type=whole, default=10, help='plateau: epochs without a better metric before a drop'),
        flag('--decay-rate', '--dr', type=not_negative, default=0.1, help='factor of a drop (poly: its power)'),
    ],
    'Augmentation and regularization parameters': [
        switch('--no-aug', help='train on resized images without augmentation'),
        flag('--train-crop-mode', known=('rrc', 'rkrc', 'rkrr'), help='training crop (rrc when unset)'),
        flag('--scale', type=positive, nargs='+', default=[0.08, 1.0], help='area range of the random resized crop'),
        flag(
            '--ratio', type=positive, nargs='+', default=[3 / 4, 4 / 3],
            help='aspect range of the random resized crop',
        ),
        flag('--hflip', type=share, default=0.5, help='probability of a horizontal flip'),
        flag('--vflip', type=share, default=0.0, help='probability of a vertical flip'),
        flag('--color-jitter', type=not_negative, default=0.4, help='strength of colour jitter (off beside --aa)'),
        flag('--color-jitter-prob', type=share, help='probability of colour jitter (always when unset)'),
        flag('--grayscale-prob', type=share, help='probability of turning an image grey'),
        flag('--gaussian-blur-prob', type=share, help='probability of a Gaussian blur'),
        flag('--aa', type=str, help='AutoAugment policy, such as v0, original or rand-m9-mstd0.5-inc1'),
        flag('--aug-repeats', type=not_negative, default=0, help='augmented copies of each image, over processes'),
        flag('--aug-splits', type=whole, default=0, help='augmentation splits of a batch (0, or 2 and more)'),
        switch('--jsd-loss', help='Jensen-Shannon divergence over --aug-splits beside cross-entropy'),
        switch('--bce-loss', help='binary cross-entropy as the task loss'),
        switch('--bce-sum', help='sum the binary cross-entropy over the classes'),
        flag('--bce-target-thresh', type=float, help='binarise soft targets at this value'),
        flag('--bce-pos-weight', type=float, help='weight of the positive term of the binary cross-entropy'),
        *LOSS_FLAGS,
        flag(
            '--task', type=one_of('', *SINGLE_LABEL, 'multilabel'),
            help='classification: an image has one class; multilabel: any number of classes, none included',
        ),
        flag(
            '--multilabel-threshold', type=number(float, above=0, below=1), default=0.5,
            help='multilabel: probability from which F1 counts a label as predicted',
        ),
        flag('--reprob', type=share, default=0., help='probability of random erasing'),
        flag('--remode', known=('const', 'rand', 'pixel'), default='pixel', help='what erased pixels become'),
        flag('--recount', type=whole, default=1, help='most rectangles erased in an image'),
        switch('--resplit', help='leave the first augmentation split without erasing'),
        flag('--mixup', type=not_negative, default=0.0, help='alpha of Mixup (0 is off)'),
        flag('--cutmix', type=not_negative, default=0.0, help='alpha of CutMix (0 is off)'),
        flag(
            '--cutmix-minmax', type=share, nargs='+',
            help='least and greatest side of the CutMix box; replaces alpha',
        ),
        flag('--mixup-prob', type=share, default=1.0, help='probability that a batch (or element) is mixed'),
        flag('--mixup-switch-prob', type=share, default=0.5, help='probability of CutMix where both are on'),
        flag(
            '--mixup-mode', known=('batch', 'pair', 'elem', 'half'), default='batch',
            help='for what one draw is made',
        ),
        flag('--mixup-off-epoch', type=whole, default=0, help='no mixing from this epoch on (0: never)'),
        flag('--smoothing', type=share_below_1, default=0.1, help='label smoothing'),
        flag(
            '--train-interpolation', known=('', *FILTERS, 'random'), default='random',
            help='resize filter of training images',
        ),
        flag('--drop', type=share_below_1, default=0.0, help='dropout rate'),
        flag('--drop-connect', type=share_below_1, help='older name of --drop-path'),
        flag('--drop-path', type=share_below_1, help='stochastic depth rate'),
        flag('--drop-block', type=share_below_1, help='DropBlock rate'),
    ],
    'Batch norm parameters': [
        flag('--bn-momentum', type=share, help='momentum of batch norm'),
        flag('--bn-eps', type=float, help='epsilon of batch norm'),
        switch('--sync-bn', help='batch norm over all processes'),
        flag(
            '--dist-bn', known=('', 'broadcast', 'reduce'), default='reduce',
            help='running statistics after each epoch ("" leaves them)',
        ),
        switch('--split-bn', help='a batch norm of its own for each augmentation split'),
    ],
    'Model exponential moving average parameters': [
        switch('--model-ema', help='keep a moving average of the weights, and validate it'),
        switch('--model-ema-force-cpu', help='keep the average on the CPU'),
        flag('--model-ema-decay', type=share, default=0.9998, help='decay of the average'),
        switch('--model-ema-warmup', help='let the decay rise from 0'),
    ],
    'Miscellaneous parameters': [
        flag('--seed', type=number(int, at_least=0, below=2 ** 32), default=42, help='random seed'),
        flag('--worker-seeding', known=('all', 'part'), default='all', help='random streams that a worker seeds'),
        flag('--log-interval', type=count, default=50, help='updates between log lines'),
        flag('--val-interval', type=count, default=1, help='epochs between validations'),
        flag('--recovery-interval', type=whole, default=0, help='updates between recovery checkpoints (0: none)'),
        flag('--checkpoint-hist', type=count, default=10, help='checkpoints to keep'),
        flag('-j', '--workers', type=whole, default=4, help='data loading processes of each training process'),
        switch('--save-images', help='write the first training batch as an image, to look at'),
        switch('--pin-mem', help='pin host memory for faster copies to the GPU'),
        switch('--no-prefetcher', help='normalise in the workers, without the prefetching loader'),
        flag('--output', type=str, metavar='DIR', default='', help='folder of runs (./output/train when empty)'),
        flag('--experiment', type=str, default='', help='name of the run, its folder below --output'),
        flag('--save-epochs', type=whole, nargs='+', help='epochs whose checkpoint is kept as milestone-N.pth.tar'),
        flag('--eval-metric', known=METRICS, default='top1', help='what makes a checkpoint best (multilabel: map)'),
        flag('--tta', type=whole, default=0, help='test-time augmentation: average this many neighbouring outputs'),
        switch('--use-multi-epochs-loader', help='keep the worker processes alive between epochs'),
        switch('--log-wandb', help='log to Weights & Biases'),
        flag('--wandb-project', type=str, help='project of Weights & Biases'),
        flag('--wandb-tags', type=str, nargs='+', metavar='TAG', default=[], help='tags of the run there'),
        flag('--wandb-resume-id', type=str, metavar='ID', default='', help='run to go on with there'),
        flag('--train-img-sizes', type=count, nargs='+', help='image sizes to train on, one drawn per batch'),
        flag('--train-batch-sizes', type=count, nargs='+', help='batch size for each of --train-img-sizes'),
        flag(
            '--train-size-probs', type=not_negative, nargs='+',
            help='weight of each of --train-img-sizes in the draw',
        ),
        flag(
            '--train-size-schedule', default='constant', choices=('constant', 'progressive'),
            help='draw sizes the same way all along, or from first to last over the run',
        ),
        flag(
            '--train-size-schedule-spread', type=not_negative, default=0.65,
            help='width of the progressive window, in sizes',
        ),
        flag(
            '--train-size-random-mix', type=share, default=0.1,
            help='share of uniform draws in the progressive schedule',
        ),
        flag('--train-batches-per-epoch', '--train-steps-per-epoch', type=count, help='batches of an epoch'),
        flag(
            '--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
            help='how the loss grows with the size of a batch that varies',
        ),
        switch('--naflex-loader', help='feed patches of images in their own aspect ratio, to a NaFlexViT or its like'),
        flag(
            '--naflex-train-seq-lens', type=count, nargs='+', default=[128, 256, 576, 784, 1024],
            help='most patches of an image, drawn per batch; --batch-size is that of the longest',
        ),
        flag('--naflex-max-seq-len', type=count, default=576, help='most patches of a validation image'),
        flag('--naflex-patch-sizes', type=count, nargs='+', help='sides of patches, drawn per batch (the model\'s)'),
        flag('--naflex-patch-size-probs', type=not_negative, nargs='+', help='weight of each of them in the draw'),
        flag(
            '--naflex-loss-scale', default='linear', choices=('none', 'sqrt', 'linear'),
            help='how the loss grows with the size of a batch, which is 1 at --batch-size',
        ),
        switch('--naflex-patchify-channels-first', help='patches with the channel as their first axis, not the last'),
    ],
}
