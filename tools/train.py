"""Train the model of a config, whatever its task."""

from mmengine.device import get_device

import mmdyn  # noqa: F401
from mmdyn.engine.command import check_checkpoint, command
from mmdyn.engine.launch import build_runner, config_parser, load_config


@command
def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument('--resume', nargs='?', const='auto', help='resume from the checkpoint, or from the latest one')
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    args = parser.parse_args()

    cfg = load_config(args)
    if args.amp:
        if get_device() == 'cpu':
            raise ValueError('--amp: mmengine trains so on a GPU alone, and torch finds none; leave it out.')
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=cfg.optim_wrapper.get('loss_scale', 'dynamic'))
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == 'auto' else args.resume
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}.')
        cfg.auto_scale_lr.enable = True
    build_runner(cfg).train()


if __name__ == '__main__':
    main()
