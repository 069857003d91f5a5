"""Test a checkpoint of a config's model, whatever its task."""

from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.evaluator import DumpResults

import mmdyn  # noqa: F401
from mmdyn.engine.command import check_checkpoint, command, output_folder
from mmdyn.engine.launch import build_runner, config_parser, load_config


@command
def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument('checkpoint')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation: the config's tta_model and pipeline"
    )
    args = parser.parse_args()

    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    check_checkpoint(args.checkpoint)
    if args.out:
        if not args.out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out {args.out}: give a file that ends in .pkl.')
        output_folder(Path(args.out).parent)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show_dir:
        hook = cfg.default_hooks.get('visualization')
        if hook is None:
            raise ValueError(f'--show-dir needs a visualization hook in the default_hooks of {args.config}.')
        of_mmpretrain = cfg.default_scope == 'mmpretrain'
        if args.tta and of_mmpretrain:
            raise ValueError("--show-dir with --tta: mmpretrain's hook cannot draw several views; leave one out.")
        # mmpretrain's hook calls its options otherwise than mmdet's and mmseg's.
        hook.update(dict(enable=True, out_dir=args.show_dir) if of_mmpretrain else dict(draw=True))
        cfg.visualizer.update(save_dir=args.show_dir)
        output_folder(args.show_dir)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise ValueError(f'--tta needs tta_model and tta_pipeline in {args.config}.')
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    runner = build_runner(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    main()
