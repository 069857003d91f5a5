# The rows of docs/results.md, which tools/analysis_tools/results.py trains and tests. Of each:
#   name, table, label   its folder, and its place on the page
#   config, parts        its config, and what is merged into it, in this order: names of dicts in the config, or dicts
#   start, backbone      the row whose weights it starts from, all of them or those of the backbone
#   train                False tests the weights that it starts from
#   beside               the dense row that its multiply-adds and times are compared with
#   turn                 what is worth more has its turn sooner
#   seeds
ON, WHOLE = ['on'], ['whole']
FINETUNE, SCRATCH, SPARSE = ['on', 'dge', 'finetune'], ['whole', 'dge', 'scratch'], ['whole', 'dge', 'sparse']
BUDGETS = {'0.25': 'budget_25', '0.75': 'budget_75', '1': 'budget_100'}
TABLE_1 = {'layer-wise': 'layerwise', '{0, 1}': 'g01', '{1, 2}': 'g12', '{1, 2, 4, 8}': 'g1248'}
NAMES = {'pvt': 'PVT', 'dpvt': 'DPVT', 'deit': 'DeiT'}
DATA = {'tiny-imagenet-50': 'Tiny-ImageNet-50', 'cifar10': 'CIFAR-10'}
# Turns of the fine-tuned rows, and of those from scratch.
TURNS = {
    ('pvt', 'tiny-imagenet-50'): (1, 1),
    ('deit', 'tiny-imagenet-50'): (2, 7),
    ('pvt', 'cifar10'): (5, 8),
    ('deit', 'cifar10'): (6, 9),
    ('dpvt', 'tiny-imagenet-50'): (7, 9),
    ('dpvt', 'cifar10'): (8, 9),
}

rows = []
for (model, data), (turn, last) in TURNS.items():
    base = dict(config=f'{model}_{data}.py', table=f'{DATA[data]}: {NAMES[model]}', turn=turn)
    folder = f'{data}/{model}'
    # What is worth less has one seed.
    late = dict(turn=last, seeds=[0, 1, 2] if model == 'pvt' and data == 'tiny-imagenet-50' else [0])
    beside, start = dict(beside=f'{folder}/dense'), dict(start=f'{folder}/base')
    if folder == 'cifar10/dpvt':
        base['seeds'] = [0]
    rows += [
        dict(base, name=f'{folder}/base', label='dense, that others start from'),
        dict(base, name=f'{folder}/dense', label='dense, trained on', parts=ON, start=f'{folder}/base'),
        dict(base, name=f'{folder}/dge', label='DGE 0.5, from dense', parts=FINETUNE, start=f'{folder}/base', **beside),
        dict(base, **beside, name=f'{folder}/scratch-sparse', label='DGE 0.5, from scratch, sparse', parts=SPARSE)
        | late,
        dict(base, **beside, name=f'{folder}/scratch', label='DGE 0.5, from scratch, all branches', parts=SCRATCH)
        | late,
    ]
    if folder == 'tiny-imagenet-50/pvt':
        fine = dict(base, start=f'{folder}/base', turn=5, **beside)
        rows += [
            *(
                dict(fine, name=f'{folder}/budget-{budget}', label=f'DGE {budget}, from dense', parts=[*FINETUNE, part])
                for budget, part in BUDGETS.items()
            ),
            *(
                dict(fine, name=f'{folder}/{part}', label=f'DGE 0.5, {label}, from dense', parts=[*FINETUNE, part])
                for label, part in TABLE_1.items()
            ),
        ]

CF = dict(
    cf_last=('score', 'last', 'class attention of the last block'),
    cf_no_reuse=('reuse', None, 'no feature reuse'),
    cf_linear=('reuse', 'linear', 'reuse by a linear layer'),
    cf_class_token=('reuse', 'class_token', 'reuse with the class token'),
    cf_uninformative=('reuse', 'uninformative', 'reuse with uninformative tokens'),
)
for data in DATA:
    turn = {'tiny-imagenet-50': 3, 'cifar10': 6}[data]
    base = dict(config=f'cf-deit_{data}.py', table=f'{DATA[data]}: CF-ViT', turn=turn, beside=f'{data}/deit/dense')
    starts = {'pre': 'from plain', 'scratch': 'from scratch'}
    folder = f'{data}/cf-deit'
    rows += [
        dict(base, name=f'{folder}/pre', label='from plain, fine', parts=['on', 'cf_on'], start=f'{data}/deit/base'),
        dict(base, name=f'{folder}/scratch', label='from scratch, fine', parts=['whole', 'cf_whole']),
    ]
    for start, label in starts.items():
        tested = dict(base, train=False, start=f'{folder}/{start}')
        rows += [
            dict(
                tested,
                name=f'{folder}/{start}-exit-{threshold}',
                label=f'{label}, {exit}',
                parts=[dict(model=dict(test_cfg=dict(threshold=threshold)))],
            )
            for threshold, exit in {
                0.0: 'coarse',
                0.3: 'early exit at 0.3',
                0.5: 'early exit at 0.5',
                0.7: 'early exit at 0.7',
            }.items()
        ]
        rows += [
            dict(
                tested,
                name=f'{folder}/{start}-{score}',
                label=f'{label}, fine, {score} patches at test',
                parts=[dict(model=dict(backbone=dict(score=score)))],
            )
            for score in ('random', 'negative')
        ]
    if data == 'tiny-imagenet-50':
        changed = dict(base, start=f'{data}/deit/base', turn=9, seeds=[0])
        rows += [
            *(
                dict(
                    changed,
                    name=f'{folder}/{name}',
                    label=f'from plain, fine, {label}',
                    parts=['on', 'cf_on', dict(model=dict(backbone={option: value}))],
                )
                for name, (option, value, label) in CF.items()
            ),
            dict(
                changed,
                name=f'{folder}/cf_ce',
                label='from plain, fine, coarse stage taught by the labels',
                parts=['on', 'cf_on', dict(model=dict(coarse_loss='ce'))],
            ),
        ]

for data, title, config in (
    ('camvid', 'CamVid: Semantic FPN with', 'fpn-{}_camvid.py'),
    ('bccd', 'BCCD: Faster R-CNN with', 'faster-rcnn-{}_bccd.py'),
):
    for model in ('pvt', 'dpvt'):
        turn = 4 if model == 'pvt' else 7
        folder, pretrained = f'{data}/{model}', f'tiny-imagenet-50/{model}/dense'
        base = dict(config=config.format(model), table=f'{title} {NAMES[model]}', turn=turn)
        beside, start = dict(beside=f'{folder}/dense'), dict(start=f'{folder}/base')
        rows += [
            dict(base, name=f'{folder}/base', label='dense, that others start from', backbone=pretrained),
            dict(base, name=f'{folder}/dense', label='dense, trained on', parts=ON, start=f'{folder}/base'),
            dict(
                base,
                name=f'{folder}/dge',
                label='DGE 0.5, from dense',
                parts=FINETUNE,
                start=f'{folder}/base',
                **beside,
            ),
            dict(
                base,
                name=f'{folder}/scratch',
                label='DGE 0.5 from the start',
                parts=SCRATCH,
                backbone=pretrained,
                seeds=[0, 1, 2] if model == 'pvt' else [0],
                **beside,
            ),
        ]
