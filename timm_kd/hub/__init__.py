"""The Hugging Face Hub: push a trained student with a model card; `python -m timm_kd.hub push RUN_DIR REPO_ID`."""
from .push import PushError, check_access, push_run

__all__ = ['PushError', 'check_access', 'push_run']
