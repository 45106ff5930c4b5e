#!/usr/bin/env python3
"""timm's training script with a teacher in it.

    python train_kd.py /data/imagenet --model resnet18 --teacher resnet34.tv_in1k --kd-loss nkd

The flags are timm's, and one group for distillation: `python train_kd.py --help`.
"""
from timm_kd.train import main

if __name__ == '__main__':
    main()
