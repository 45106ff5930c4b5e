"""What a model card says about a loss: its formula, as `timm_kd.losses` computes it, and the papers to cite."""

from typing import NamedTuple

TIMM = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""

_KD = """@article{hinton2015distilling,
  author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  title = {Distilling the Knowledge in a Neural Network},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}"""

_DKD = """@inproceedings{zhao2022decoupled,
  author = {Borui Zhao and Quan Cui and Renjie Song and Yiyu Qiu and Jiajun Liang},
  title = {Decoupled Knowledge Distillation},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:2203.08679},
  year = {2022}
}"""

_NKD = """@article{yang2022rethinking,
  author = {Zhendong Yang and Zhe Li and Yuan Gong and Tianke Zhang and Shanshan Lao and Chun Yuan and Yu Li},
  title = {Rethinking Knowledge Distillation via Cross-Entropy},
  journal = {arXiv preprint arXiv:2208.10139},
  year = {2022}
}"""

_NKD_ICCV = """@inproceedings{yang2023knowledge,
  author = {Zhendong Yang and Ailing Zeng and Zhe Li and Tianke Zhang and Chun Yuan and Yu Li},
  title = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
    and Customized Soft Labels},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  note = {arXiv:2303.13005},
  year = {2023}
}"""

_TFKD = """@inproceedings{yuan2020revisiting,
  author = {Li Yuan and Francis EH Tay and Guilin Li and Tao Wang and Jiashi Feng},
  title = {Revisiting Knowledge Distillation via Label Smoothing Regularization},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:1909.11723},
  year = {2020}
}"""

LOGIT_STANDARDIZATION = """@inproceedings{sun2024logit,
  author = {Shangquan Sun and Wenqi Ren and Jingzhi Li and Rui Wang and Xiaochun Cao},
  title = {Logit Standardization in Knowledge Distillation},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  note = {arXiv:2403.01427},
  year = {2024}
}"""


class LossFacts(NamedTuple):
    """A loss for a reader: its name, its formula in LaTeX, what stands in it, and the papers in BibTeX."""

    title: str
    formula: str
    symbols: str
    citations: tuple[str, ...]


_LOGITS = r'\\(z_s\\) and \\(z_t\\) the logits of student and teacher, \\(p\\) their softmax'
_STUDENT = r'\\(z_s\\) the logits of the student, \\(p\\) their softmax, \\(y\\) the true class'
_Q = r'\\(y\\) the true class, \\(q\\) the softmax over the other classes'
_HINTON = r'D = T^2\,\operatorname{mean}\,\mathrm{KL}\big(p(z_t/T)\,\|\,p(z_s/T)\big)'

# By the loss's name and whether a teacher took part.
LOSSES: dict[tuple[str, bool], LossFacts] = {
    ('kd', True): LossFacts('Knowledge distillation (KD)', _HINTON, _LOGITS, (_KD,)),
    ('dkd', True): LossFacts(
        'Decoupled knowledge distillation (DKD)',
        r'D = T^2\,\operatorname{mean}\Big(\alpha\,\mathrm{KL}\big(b(z_t/T)\,\|\,b(z_s/T)\big)'
        r' + \beta\,\mathrm{KL}\big(q(z_t/T)\,\|\,q(z_s/T)\big)\Big),\quad b = [p_y,\,1 - p_y]',
        f'{_LOGITS}, {_Q}',
        (_DKD,),
    ),
    ('nkd', True): LossFacts(
        'Normalized knowledge distillation (NKD)',
        r'D = -\operatorname{mean}\,p_y(z_t)\log p_y(z_s)\;-\;'
        r'\gamma\,T^2\,\operatorname{mean}\sum_{i \ne y} q_i(z_t/T)\log q_i(z_s/T)',
        f'{_LOGITS}, {_Q}',
        (_NKD, _NKD_ICCV),
    ),
    ('tfnkd', False): LossFacts(
        'Teacher-free NKD (tf-NKD)',
        r'D = -\operatorname{mean}\,w\log p_y(z_s),\quad w = p_y(z_s) + 1 - \operatorname{mean}\,p_y(z_s)',
        _STUDENT,
        (_NKD,),
    ),
    ('tfkd', True): LossFacts('Teacher-free KD by self-training (Tf-KD self)', _HINTON, _LOGITS, (_TFKD,)),
    ('tfkd', False): LossFacts(
        'Teacher-free KD by regularization (Tf-KD reg)',
        r'D = \operatorname{mean}\,\mathrm{KL}\big(\mathrm{softmax}(v/T)\,\|\,p(z_s)\big),\quad '
        r'v_y = a,\quad v_i = \frac{1 - a}{C - 1}\ (i \ne y)',
        _STUDENT + r', \\(C\\) the number of classes',
        (_TFKD,),
    ),
}

# How the parameters of the losses appear in the formulas.
SYMBOLS = {
    'temperature': 'temperature, T',
    'alpha': 'alpha, weight of the target class against the rest',
    'beta': 'beta, weight of the other classes',
    'gamma': 'gamma, weight of the other classes',
    'correct_prob': 'correct_prob, a',
}
