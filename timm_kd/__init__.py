"""Knowledge distillation with timm."""
