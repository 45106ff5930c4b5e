"""What timm's tests of multi-label runs import as `validate`: their checkpoint, read and measured by timm's parts."""
import torch
from timm.data import MultiLabelTarget, create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint
from timm.task import MultiLabelClassificationEvaluator

from timm_kd import engine
from timm_kd.cli import build_parser

parser = build_parser()
parser.add_argument('--checkpoint')
parser.add_argument('--use-ema', action='store_true')


def validate(args):
    """Return the metrics of a checkpoint on the validation split."""
    model = create_model(args.model, num_classes=args.num_classes)
    load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    config, device = resolve_data_config(vars(args), model=model), torch.device('cpu')
    dataset = create_dataset(
        args.dataset,
        split=args.val_split,
        target_key=args.target_key,
        target_transform=MultiLabelTarget(args.num_classes),
    )
    images = {name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    loader = create_loader(dataset, batch_size=args.batch_size, num_workers=0, device=device, **images)
    return engine.validate(model, loader, MultiLabelClassificationEvaluator(), engine.StepSettings(device))
