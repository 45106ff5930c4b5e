"""A loss that the project does not have, in a file of its own: logit regression, by its formula alone."""
from torch import Tensor

from timm_kd.losses import DistillationLoss
from timm_kd.losses.base import LOGITS, Paper, knob
from timm_kd.losses.targets import Labels


class LogitRegressionLoss(DistillationLoss):
    """Half the squared distance of the logits, `D = scale / 2 mean_b |z_s - z_t|^2` (Ba and Caruana 2014, eq. 1)."""
    paper = Paper(
        title='Logit regression',
        formula=r'D = \frac{s}{2}\,\operatorname{mean}\,\|z_s - z_t\|^2',
        symbols=LOGITS,
        citations=("""@inproceedings{ba2014deep,
  author = {Lei Jimmy Ba and Rich Caruana},
  title = {Do Deep Nets Really Need to be Deep?},
  booktitle = {Advances in Neural Information Processing Systems},
  note = {arXiv:1312.6184},
  year = {2014}
}""",),
    )
    component_names = ('largest',)
    default_task_weight = 0.25
    default_distill_weight = 0.5
    default_warmup = 0.5

    scale: float = knob(0.1, 's, factor of the squared distance', above=0)
    temperature: float = knob(2.0, 'T, which divides the logits', above=0, at_most=8)

    def formula(self, student: Tensor, teacher: Tensor, labels: Labels) -> dict[str, Tensor]:
        rows = ((student - teacher) / self.temperature).square().sum(1)
        return {'kd_loss': self.scale / 2 * rows.mean(), 'largest': rows.max()}
