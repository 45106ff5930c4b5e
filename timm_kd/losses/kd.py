"""Knowledge distillation (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531)."""
from torch import Tensor

from .base import LOGITS, ClosedForm, DistillationLoss, Paper, logit_std_knob, temperature_knob
from .kernel import (
    kl_divergence,
    kl_from_cross,
    prepare,
    soften_teacher,
    softmax,
    standardize_backward_,
    teacher_cross_,
)
from .targets import Labels


class KDLoss(DistillationLoss):
    """The softened teacher's divergence from the softened student: `D = T^2 mean_b KL(p(z_t / T) || p(z_s / T))`.

    The target is only looked at for classes the teacher masks. No components. T is 4 by default, as in timm's script.
    """
    paper = Paper(
        title='Knowledge distillation (KD)',
        formula=r'D = T^2\,\operatorname{mean}\,\mathrm{KL}\big(p(z_t/T)\,\|\,p(z_s/T)\big)',
        symbols=LOGITS,
        citations=("""@article{hinton2015distilling,
  author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  title = {Distilling the Knowledge in a Neural Network},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}""",),
    )

    temperature: float = temperature_knob(4.0)
    logit_std: bool = logit_std_knob()

    def formula(self, student: Tensor, teacher: Tensor, labels: Labels) -> dict[str, Tensor]:
        student, teacher, scale = prepare(student, teacher, labels, self.logit_std)
        rows = kl_divergence(
            soften_teacher(teacher, self.temperature).log_softmax(1),
            (student / self.temperature).log_softmax(1),
        )
        return {'kd_loss': self.temperature ** 2 * (scale * rows).sum()}

    def closed_form(self, student: Tensor, teacher: Tensor, labels: Labels) -> ClosedForm:
        raw = student
        student, teacher, scale = prepare(student, teacher, labels, self.logit_std)
        softened = soften_teacher(teacher, self.temperature)
        p_teacher = softmax(softened)
        cross = teacher_cross_(softened, p_teacher, student, 1 / self.temperature)
        del softened  # the student's softened logits take its memory
        p_student = softmax(student * (1 / self.temperature))
        rows = kl_from_cross(cross, p_teacher, p_student)
        gradient = p_student.probs.sub_(p_teacher.probs)
        if self.logit_std:
            gradient = standardize_backward_(gradient, raw)
        return {'kd_loss': self.temperature ** 2 * (scale * rows).sum()}, gradient, self.temperature * scale
