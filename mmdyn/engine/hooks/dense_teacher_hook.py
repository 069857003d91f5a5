import copy
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn

from ...models.backbones.base import find_backbones
from ...models.backbones.cfvit import CFViT
from ...models.checks import has_backbone
from ...registry import HOOKS
from ...values import check_number, check_type
from .loss_hook import LossHook

# In the message hub, which checkpoints hold and resuming restores.
TEACHER = 'dense_teacher'


def without_dge(config: Any) -> Any:
    """A copy of a model's config without the option ``dge``, wherever it is."""
    if isinstance(config, dict):
        return type(config)({name: without_dge(value) for name, value in config.items() if name != 'dge'})
    if isinstance(config, (list, tuple)):
        return type(config)(without_dge(value) for value in config)
    return copy.deepcopy(config)


def plain_twin(config: Any, stages: CFViT | None) -> Any:
    """The config of the model that teaches: without DGE, and with a plain backbone in place of CF-ViT's stages."""
    config = without_dge(config)
    if stages is None:
        return config
    options = {name: value for name, value in config.items() if name not in ('coarse_loss', 'test_cfg')}
    return {**options, 'type': 'mmpretrain.ImageClassifier', 'backbone': stages.plain_config}


def flat(features: Any) -> list[Tensor]:
    """The tensors of nested tuples or lists."""
    if isinstance(features, Tensor):
        return [features]
    return [tensor for part in features for tensor in flat(part)]


def feature_distance(features: Any, wanted: Any) -> Tensor:
    """Mean squared distance of normalised features.

    The channels of each cell or token are normalised to mean 0 and variance 1, so that maps of all stages count alike.

    Args:
        features, wanted: tensors, or nested tuples of tensors, whose distances are averaged: maps (B, C, h, w), tokens
            (B, N, C) or vectors (B, C).
    """

    def normal(tensor: Tensor) -> Tensor:
        tensor = tensor.float().movedim(1 if tensor.ndim == 4 else -1, -1)
        return F.layer_norm(tensor, tensor.shape[-1:])

    distances = [
        F.mse_loss(normal(one), normal(other)) for one, other in zip(flat(features), flat(wanted), strict=True)
    ]
    return torch.stack(distances).mean()


def divergence(logits: Tensor, wanted: Tensor, tau: float) -> Tensor:
    """Tau^2 times the KL divergence of softmax(``logits`` / tau) from softmax(``wanted`` / tau), both (B, classes)."""
    log_p, log_q = ((x.float() / tau).log_softmax(-1) for x in (wanted, logits))
    return tau**2 * F.kl_div(log_q, log_p, reduction='batchmean', log_target=True)


def stages_of(model: nn.Module) -> CFViT | None:
    """The backbone of CF-ViT, if that is what a model has."""
    backbone = getattr(model, 'backbone', None)
    return backbone if isinstance(backbone, CFViT) else None


@HOOKS.register_module()
class DenseTeacherHook(LossHook):
    """Let the dense twin of a model with DGE teach it, in mmpretrain, mmdet or mmseg; or a plain DeiT or LV-ViT CF-ViT.

    The twin is built from the model's own config without ``dge``, and with one stage in place of CF-ViT's two. It sees
    the same images in evaluation mode, without gradients and so by the fast kernels, and is no part of the model: not
    of its checkpoints, averaged weights, optimizer or counted costs.

    Added to the losses are ``loss_teacher_features``, the distance of what heads take (of the neck, or else the
    backbone), each cell's channels normalised, and, of classifiers, ``loss_teacher_logits``, the KL divergence. Of
    CF-ViT they are means of both stages, whose features are the class tokens.

    Args:
        checkpoint: of the dense model, whole, with neck and heads. Defaults to the one that the training started from,
            ``load_from`` of the config, also after resuming.
        logits: weight of the classifiers' divergence; 0 for heads that give no softmax over classes.
        features: weight of the features' distance.
        tau: temperature of the softmax.

    Raises:
        ValueError: for negative weights or two of 0, or tau not above 0; before training for a model without DGE or
            without a backbone, or not built from a config, without a checkpoint, or with one of another architecture or
            number of classes.
    """

    def __init__(
        self, checkpoint: str | None = None, logits: float = 0.5, features: float = 0.5, tau: float = 1.0
    ) -> None:
        for name, value in (('logits', logits), ('features', features)):
            check_number(f'DenseTeacherHook: {name}', value, '[0, inf)', 'the weight of a loss')
        if logits == features == 0:
            raise ValueError(
                'DenseTeacherHook: logits=0 and features=0 are the weights of its losses: one has to be greater than 0.'
            )
        check_number('DenseTeacherHook: tau', tau, '(0, inf)', 'the temperature of the softmax')
        check_type(
            'DenseTeacherHook: checkpoint', checkpoint, (str, type(None)), 'the path of a checkpoint of the dense model'
        )
        self.checkpoint, self.logits, self.features, self.tau = checkpoint, logits, features, tau

    def prepare(self, runner: Runner, model: nn.Module) -> None:
        """Build the twin, load its weights, and listen to what the model's heads take."""
        self._teacher: Any = None
        self._taken: list[Any] = []
        if not has_backbone(model, 'DenseTeacherHook'):
            return
        if stages_of(model) is None and not any(backbone.has_dge for backbone in find_backbones(model)):
            raise ValueError(
                'DenseTeacherHook found no DGE and no CFViT in the model, which then is its own dense twin: give its '
                'backbone dge=dict(granularities=(1, 2, 4)), or leave out the hook.'
            )
        if not hasattr(model, 'backbone'):
            raise ValueError(
                f'DenseTeacherHook compares what a backbone or a neck returns, and the {type(model).__name__} has '
                'neither: leave out the hook, or take the same network as the backbone of an ImageClassifier.'
            )
        config = runner.cfg.get('model')
        if not isinstance(config, dict):
            raise ValueError(
                'DenseTeacherHook builds the dense twin from the config of the model, but the Runner got '
                f'a {type(config).__name__}: give it model=dict(...) in its cfg.'
            )
        path = self.checkpoint or (runner.message_hub.get_info(TEACHER) if runner.iter else runner.cfg.get('load_from'))
        if path is None:
            raise ValueError(
                'DenseTeacherHook: the training starts from no checkpoint, so that there is no dense model '
                "to learn from: write load_from='<checkpoint of the dense model>' in the config, or give "
                'the hook a checkpoint.'
            )
        runner.message_hub.update_info(TEACHER, path)
        teacher = MODELS.build(plain_twin(config, stages_of(model)))
        try:
            load_checkpoint(teacher, path, map_location='cpu', strict=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f'DenseTeacherHook: {path} is no checkpoint of the plain model. Give one of the same '
                f'architecture and classes, with neck and heads. {error}'
            ) from error
        for backbone in find_backbones(teacher):
            backbone.is_counted = False
        self._teacher = teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        stages = stages_of(model)
        # Each stage of CF-ViT ends with its norm.
        source: Any = stages.norm if stages else getattr(model, 'neck', None) or model.backbone
        self._source_handle = source.register_forward_hook(self._keep)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        super().after_train(runner)
        if self._teacher is not None:
            self._source_handle.remove()
            self._teacher, self._taken = None, []

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training:
            self._taken.append(output)

    def on_forward(self, model: nn.Module, losses: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Add the losses."""
        if self._teacher is None or losses is None:
            return
        taken, self._taken = self._taken, []
        head: Any = getattr(model, 'head', None)
        with torch.no_grad():
            wanted = self._teacher.extract_feat(inputs['inputs'])
            wanted_logits = self._teacher.head(wanted) if head is not None and self.logits else None
        stages = stages_of(model)
        # What the head takes, and what is compared with the twin's.
        outputs = [taken[-1]] if stages is None else [(stages.output(tokens),) for tokens in taken[-2:]]
        features = outputs if stages is None else [tokens[:, 0] for tokens in taken[-2:]]
        if stages is not None:
            wanted = wanted[-1][:, 0] if wanted[-1].ndim == 3 else wanted[-1]
        if self.features:
            distances = [feature_distance(of_stage, wanted) for of_stage in features]
            losses['loss_teacher_features'] = self.features * torch.stack(distances).mean()
        if wanted_logits is not None:
            divergences = [divergence(head(output), wanted_logits, self.tau) for output in outputs]
            losses['loss_teacher_logits'] = self.logits * torch.stack(divergences).mean()
