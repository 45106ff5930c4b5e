"""What a model card says about a loss: its formula, as `timm_kd.losses` computes it, and the papers to cite."""

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
  note = {arXiv:2403.01993},
  year = {2024}
}"""

_HINTON = r'D = T^2\,\operatorname{mean}_b\,\mathrm{KL}\big(p(z_t/T)\,\|\,p(z_s/T)\big)'

# By the loss's name and whether a teacher took part: its title, formula, and papers.
LOSSES: dict[tuple[str, bool], tuple[str, str, tuple[str, ...]]] = {
    ('kd', True): ('Knowledge distillation (KD)', _HINTON, (_KD,)),
    ('dkd', True): (
        'Decoupled knowledge distillation (DKD)',
        r'D = T^2\,\operatorname{mean}_b\big(\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD}\big),\quad '
        r'\mathrm{TCKD} = \mathrm{KL}\big([p_y, 1 - p_y]_t\,\|\,[p_y, 1 - p_y]_s\big),\quad '
        r'\mathrm{NCKD} = \mathrm{KL}(q_t\,\|\,q_s),\quad q_i = \frac{p_i}{1 - p_y}\ (i \ne y)',
        (_DKD,),
    ),
    ('nkd', True): (
        'Normalized knowledge distillation (NKD)',
        r'D = -\operatorname{mean}_b\,p_y(z_t)\log p_y(z_s)\;-\;'
        r'\gamma\,T^2\,\operatorname{mean}_b\sum_{i \ne y} q_i(z_t/T)\log q_i(z_s/T)',
        (_NKD, _NKD_ICCV),
    ),
    ('tfnkd', False): (
        'Teacher-free NKD (tf-NKD)',
        r'D = -\operatorname{mean}_b\,w\log p_y(z_s),\quad w = p_y(z_s) + 1 - \operatorname{mean}_b\,p_y(z_s)',
        (_NKD,),
    ),
    ('tfkd', True): ('Teacher-free KD by self-training (Tf-KD self)', _HINTON, (_TFKD,)),
    ('tfkd', False): (
        'Teacher-free KD by regularization (Tf-KD reg)',
        r'D = \operatorname{mean}_b\,\mathrm{KL}\big(\mathrm{softmax}(v/T)\,\|\,p(z_s)\big),\quad '
        r'v_y = a,\quad v_i = \frac{1 - a}{C - 1}\ (i \ne y)',
        (_TFKD,),
    ),
}

# How the parameters of the losses appear in the formulas.
SYMBOLS = {
    'temperature': 'temperature, T',
    'alpha': 'alpha, weight of TCKD',
    'beta': 'beta, weight of NCKD',
    'gamma': 'gamma, weight of the non-target term',
    'correct_prob': 'correct_prob, a',
}
