import importlib.util
from pathlib import Path

import mmdyn

spec = importlib.util.spec_from_file_location('demo', Path(mmdyn.__file__).parents[1] / 'tools/demo.py')
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

COSTS = {'flops/query_ratio': 0.5, 'flops/gflops_dense': 0.02, 'flops/gflops': 0.01234, 'seconds': 61.7}


def test_a_task_has_the_columns_of_its_metrics():
    lines = demo.table({'det': {'coco/bbox_mAP_50': 0.8125, 'coco/segm_mAP_50': 0.5, 'coco/bbox_mAP': 0.4, **COSTS}})
    head, row = lines.splitlines()
    assert head.split('  ')[-1].strip() == 'training s' and 'top-1' not in head and 'mIoU' not in head
    assert row.split() == ['det', '81.2', '50.0', '0.500', '20.00', '12.34', '62']


def test_configs_of_different_tasks_share_a_table():
    lines = demo.table({'a': {'accuracy/top1': 90., **COSTS}, 'segmentation': {'mIoU': 33.333, **COSTS}}).splitlines()
    assert lines[0].index('top-1 %') < lines[0].index('mIoU %')
    assert lines[1].split()[:3] == ['a', '90.0', '-'] and lines[2].split()[:3] == ['segmentation', '-', '33.3']
    assert len({len(line) for line in lines}) == 1
