"""Teacher: a frozen model that answers the student's images with logits of the student's classes; or several."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import clean_state_dict, get_model_input_config
from timm.utils import unwrap_model
from torch import nn

from ..errors import UsageError, shortened
from .adapt import InputAdapter, can_adapt_channels
from .classmap import ClassMap, load_class_map
from .fast import fold_batch_norms, is_convolutional, resolve_dtype
from .spec import check_num_classes, load_model, locate

_logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A model from anywhere, frozen, always in eval mode, adapted to the student's images and classes.

    Args:
        spec: A timm name, `hf-hub:org/name`, `local-dir:PATH`, a folder, a weights file, `org/name` on the Hub; or a
            module, which is frozen in place, and moved and narrowed in place if it has no batch norms to fold.
        num_classes: The student's classes. Checked, never used to rebuild a head; it sizes the model of a weights
            file that does not tell. None: not checked.
        mean: Mean the images were normalised with; None: the images are taken to be normalised for the teacher.
        std: Standard deviation the images were normalised with; None as above.
        in_chans: Channels of the images. Between grey and RGB the images are adapted; to any other count, timm adapts
            the stem's weights.
        img_size: Input size of the teacher; None: its own where that is fixed (ViT, Swin), else that of the images.
        device: Where it runs; None: where the model is.
        dtype: `auto`, `float32`, `bfloat16` or `float16`: it runs in that precision outside autocast; `amp`: in
            float32 inside the caller's autocast.
        model: Architecture of a weights file.
        model_kwargs: Further arguments of the architecture.
        use_ema: Take the EMA weights of a checkpoint file.
        class_map: Which classes of the teacher are the student's: a file or a name, see `load_class_map`.
        class_map_missing: `error` refuses a map with classes the teacher lacks, `mask` gives them the logit -inf.
        fold_bn: Fold batch norms into convolutions, where the logits stay the same; never under `amp`, which runs the
            model as it is. A fingerprint is always that of the weights as loaded.
        compile_backend: Compile the teacher for this backend of `torch.compile` when it is first asked.

    Attributes:
        source: The spec, as a string.
        model_name: Architecture.
        num_params: Parameters of the model as loaded.
        num_classes: Columns of the logits; None for a module that does not tell, until its first batch.
        folded: Whether batch norms are folded.

    Raises:
        UsageError: If the teacher cannot be had or cannot teach this student. The message names arguments in backticks.
    """

    def __init__(
            self,
            spec: str | Path | nn.Module,
            num_classes: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
            in_chans: int = 3,
            img_size: int | tuple[int, int] | None = None,
            device: torch.device | str | None = None,
            dtype: str = 'auto',
            *,
            model: str | None = None,
            model_kwargs: dict[str, Any] | None = None,
            use_ema: bool = False,
            class_map: str | Path | None = None,
            class_map_missing: str = 'error',
            fold_bn: bool = True,
            compile_backend: str | Callable | None = None,
    ):
        super().__init__()
        if isinstance(spec, nn.Module):
            self.source, net = type(spec).__name__, spec
        else:
            self.source = str(spec)
            checked_classes = None if class_map is not None else num_classes
            net = load_model(self.source, checked_classes, in_chans, img_size, model, model_kwargs, use_ema)
        net.eval().requires_grad_(False)
        inner = unwrap_model(net)
        expects = get_model_input_config(inner)
        self.model_name = getattr(inner, 'pretrained_cfg', {}).get('architecture') or type(inner).__name__
        self.num_params = sum(p.numel() for p in net.parameters())
        own_classes = getattr(inner, 'num_classes', None)
        device = torch.device(device) if device is not None else next((p.device for p in net.parameters()), None)
        self.classes = None
        if class_map is None:
            check_num_classes(self.source, own_classes, num_classes)
        elif num_classes is None or own_classes is None:
            raise UsageError(f'`class_map` {class_map} needs the class counts of student and teacher.')
        else:
            indices = load_class_map(class_map, num_classes, own_classes, class_map_missing)
            self.classes = ClassMap(str(class_map), indices, device)
        self.num_classes = num_classes or own_classes

        self.dtype_name = dtype
        self.dtype = resolve_dtype(dtype, device or torch.device('cpu'))
        self.channels_last = is_convolutional(net)
        self.inputs = self._adapter(inner, expects, in_chans, mean, std, img_size, device)
        self.model = net
        if fold_bn and dtype != 'amp':
            trial_size = self.inputs.size or expects['input_size'][1:]
            if not expects['fixed_input_size']:
                trial_size = (min(128, length) for length in trial_size)
            self.model = fold_batch_norms(net, (self.inputs.teacher_chans, *trial_size))
        self.folded = self.model is not net
        self._loaded_hash = _hash_weights(net, self.dtype) if self.folded else None
        self.model.to(
            device=device,
            dtype=self.dtype,
            memory_format=torch.channels_last if self.channels_last else torch.preserve_format,
        )
        self._compile_options = None if compile_backend is None else {'backend': compile_backend}
        self._compiled: dict[Callable, Callable] = {}
        self._checked = False
        self.eval()

    @property
    def members(self) -> list['Teacher']:
        """Return the single teachers behind this one: itself."""
        return [self]

    def _adapter(
            self,
            inner: nn.Module,
            expects: dict[str, Any],
            in_chans: int,
            mean: Sequence[float] | None,
            std: Sequence[float] | None,
            img_size: int | tuple[int, int] | None,
            device: torch.device | None,
    ) -> InputAdapter:
        """Make the adapter of the images, from what the built model expects."""
        data = resolve_model_data_config(inner)  # ImageNet's mean and deviation for a module that is not timm's
        stem = next((m for m in inner.modules() if isinstance(m, nn.Conv2d)), None)  # of a module that is not timm's
        chans = expects['input_size'][0] if hasattr(inner, 'pretrained_cfg') else stem.in_channels if stem else in_chans
        if not can_adapt_channels(in_chans, chans):
            raise UsageError(f"teacher '{self.source}' takes {chans} channels, the images have {in_chans}.")
        size = None if img_size is None else to_2tuple(img_size)
        if expects['fixed_input_size']:
            own = tuple(expects['input_size'][1:])
            if size not in (None, own):
                raise UsageError(f"`img_size` {size[0]}: teacher '{self.source}' takes {own[0]}x{own[1]} only.")
            size = own
        if not all(0 < value < math.inf for value in data['std']):
            raise UsageError(
                f"teacher '{self.source}' gives {tuple(data['std'])} as the standard deviation of its images, by which "
                'nothing can be divided: correct it in its config.json, pretrained_cfg or checkpoint.'
            )
        return InputAdapter(
            in_chans, mean, std, chans, data['mean'], data['std'],
            size=size,
            interpolation=data['interpolation'] if data['interpolation'] in ('bilinear', 'bicubic') else 'bicubic',
            dtype=self.dtype,
            channels_last=self.channels_last,
            device=device,
        )

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode, whatever the mode of what holds the teacher."""
        return super().train(False)

    def compile(self, backend: str | Callable = 'inductor', mode: str | None = None, **compile_kwargs) -> 'Teacher':
        """Compile the forward, input adaptation included, when the teacher is next asked.

        A teacher that was made with a `compile_backend`, or compiled before, stays as it is. Should the compiler fail,
        the teacher runs uncompiled, with one warning.
        """
        if self._compile_options is None:
            self._compile_options = {'backend': backend, 'mode': mode, **compile_kwargs}
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Answer a batch.

        Args:
            images: `[B, in_chans, H, W]` as the student gets them, or the dict of patches of a NaFlex loader; never
                modified.

        Returns:
            Logits `[B, num_classes]` in float32, without gradient.

        Raises:
            UsageError: If the teacher refuses the size of the images, or the logits of the first batch are NaN,
                infinite or of the wrong shape.
        """
        logits = self._answer(self._logits, images)
        if not self._checked:
            self._check(logits, _pixels(images))  # the only host sync, once
        return logits if self.classes is None else self.classes(logits)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled features of a timm model, of which its last layer makes the logits.

        Args:
            images: `[B, in_chans, H, W]` as the student gets them; never modified.

        Returns:
            Features `[B, D]` in float32, without gradient.

        Raises:
            UsageError: If the teacher refuses the size of the images.
        """
        return self._answer(self._features, images)

    def _answer(self, compute: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Compute in the model's own precision, and compiled if that was asked for."""
        device_type = _pixels(images).device.type
        autocast = self.dtype_name != 'amp' and torch.amp.is_autocast_available(device_type)  # not on the meta device
        own_precision = torch.autocast(device_type, enabled=False) if autocast else nullcontext()
        try:
            with own_precision:
                return compute(images) if self._compile_options is None else self._compiled_answer(compute, images)
        except AssertionError as error:  # how timm's models refuse a size
            size = 'x'.join(map(str, _pixels(images).shape[-2:]))
            raise UsageError(
                f"teacher '{self.source}' refuses images of {size} ({error}): `img_size` N resizes them for it."
            ) from error

    def _compiled_answer(self, compute: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        try:
            from torch._inductor import config  # an import of seconds, which fails where inductor cannot work
            if compute not in self._compiled:
                self._compiled[compute] = torch.compile(compute, **self._compile_options)
            # Freezing makes the weights constants of the code that inductor generates.
            with config.patch(freezing=True):
                # A copy: CUDA graphs answer the next batch in the memory of this one.
                return self._compiled[compute](images).clone()
        except Exception as error:
            answer = compute(images)  # raises again where the model is at fault, and not the compiler
            _logger.warning(f'Teacher {self.source} runs uncompiled, torch.compile failed: {shortened(error)}')
            self._compile_options = None
            return answer

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.model.forward_features(self.inputs(images)), pre_logits=True).float()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        output = self.model(self.inputs(images))
        if isinstance(output, dict):
            output = output.get('logits')  # as the models of transformers return them
        if isinstance(output, tuple | list) and output and all(isinstance(each, torch.Tensor) for each in output):
            # class and distillation token of a distilled ViT: their mean is timm's own answer in eval mode
            alike = all(each.shape == output[0].shape for each in output)
            output = torch.stack([each.float() for each in output]).mean(0) if alike else None
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise UsageError(f"teacher '{self.source}' ({self.model_name}) returns no logits [batch, classes].")
        return output.float()

    def _check(self, logits: torch.Tensor, images: torch.Tensor) -> None:
        """Refuse a teacher whose first answers are of the wrong width, or not finite."""
        if self.classes is None:
            check_num_classes(self.source, logits.shape[1], self.num_classes)
            self.num_classes = logits.shape[1]
        if not torch.isfinite(logits).all():
            if not torch.isfinite(images).all():
                raise UsageError('the first batch of images holds NaN or infinity: see `mean`, `std` and the data.')
            narrow = self.dtype != torch.float32 or self.dtype_name == 'amp'
            raise UsageError(
                f"teacher '{self.source}' returns NaN or infinite logits on the first batch: "
                + ('try `dtype` float32.' if narrow else 'its weights are damaged.')
            )
        self._checked = True

    def weights_hash(self) -> str:
        """Return the sha256 of the weights as loaded, in the precision they run in: names, shapes and values."""
        return self._loaded_hash or _hash_weights(self.model, self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides the logits of an image, as JSON types: equal ones share stored logits."""
        return {
            'weights': self.weights_hash(),
            'dtype': str(self.dtype).removeprefix('torch.') + (' amp' if self.dtype_name == 'amp' else ''),
            'images': self.inputs.fingerprint(),
            'classes': None if self.classes is None else self.classes.fingerprint(),
        }

    def describe(self) -> str:
        """Say in one line what the teacher is and does."""
        precision = str(self.dtype).removeprefix('torch.') + (' under autocast' if self.dtype_name == 'amp' else '')
        parts = [
            f'{self.source} ({self.model_name}): {self.num_params / 1e6:.2f} M parameters',
            precision,
            'batch norms folded' if self.folded else None,
            None if self._compile_options is None else f'compiled by {self._compile_options["backend"]}',
            'channels-last' if self.channels_last else 'contiguous',
            f'images {self.inputs.describe()}',
            None if self.classes is None else self.classes.describe(),
        ]
        return ', '.join(part for part in parts if part)


def _pixels(images: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    return images['patches'] if isinstance(images, dict) else images


def _hash_weights(model: nn.Module, dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(clean_state_dict(model.state_dict()).items()):
        tensor = tensor.to('cpu', dtype if tensor.is_floating_point() else None).contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class TeacherEnsemble(nn.Module):
    """Several teachers as one: the mean of their probabilities at temperature 1, as log-probabilities.

    Args:
        members: The teachers, each with its own adaptation to the student's images and classes.

    Attributes:
        members: The teachers.
        source: Their sources.
        num_classes: Columns of the logits.
    """

    def __init__(self, members: Sequence[Teacher]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.source = ' + '.join(m.source for m in members)
        self.num_classes = members[0].num_classes
        self.eval()

    def train(self, mode: bool = True) -> 'TeacherEnsemble':
        """Stay in eval mode, whatever the mode of what holds the teachers."""
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> 'TeacherEnsemble':
        """Compile each member, as `Teacher.compile`."""
        for member in self.members:
            member.compile(*args, **kwargs)
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the log of the mean probabilities `[B, num_classes]` of images `[B, in_chans, H, W]`, in float32."""
        return self.combine([member(images) for member in self.members])

    @staticmethod
    def combine(logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the log of the mean probabilities `[B, num_classes]` of each member's logits `[B, num_classes]`."""
        log_probs = torch.stack([each.log_softmax(dim=1) for each in logits])
        return log_probs.logsumexp(dim=0) - math.log(len(logits))

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides the logits of an image, of each member by its number."""
        return {str(i): member.fingerprint() for i, member in enumerate(self.members)}

    def describe(self) -> str:
        """Say what the teachers are and do, in one line each."""
        return '\n'.join(m.describe() for m in self.members)


def create_teacher(
        spec: str | Path | nn.Module | Sequence[str | Path | nn.Module],
        *args: Any,
        model: str | None = None,
        use_ema: bool = False,
        **kwargs: Any,
) -> Teacher | TeacherEnsemble:
    """Make the teacher of a spec, or the ensemble of a list of specs.

    Args:
        spec: A spec of `Teacher`, or a list of them. Teachers that need different architectures or class maps are made
            one by one, and go into a `TeacherEnsemble`.
        *args: Further positional arguments of `Teacher`.
        model: Architecture of the weights files among the specs.
        use_ema: Take the EMA weights of the weights files among the specs.
        **kwargs: Further arguments of `Teacher`.

    Raises:
        UsageError: If a teacher cannot be had or cannot teach this student.
    """
    specs = [spec] if isinstance(spec, str | Path | nn.Module) else list(spec)
    of_a_file = {'model': model, 'use_ema': use_ema}
    if len(specs) == 1:
        return Teacher(specs[0], *args, **of_a_file, **kwargs)
    is_file = [not isinstance(each, nn.Module) and locate(str(each))[0] == 'file' for each in specs]
    if not any(is_file) and (use_ema or model is not None):
        raise UsageError('`model` and `use_ema` are for weights files, and no teacher is one.')
    return TeacherEnsemble([
        Teacher(each, *args, **(of_a_file if file else {}), **kwargs) for each, file in zip(specs, is_file, strict=True)
    ])
