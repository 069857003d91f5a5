# The rows of docs/results.md, which tools/analysis_tools/results.py trains and tests. Of each:
#   name, table, label   its folder, and its place on the page
#   config, parts        its config, and what is merged into it, in this order: names of dicts in the config, or dicts
#   start, backbone      the row whose weights it starts from, all of them or those of the backbone
#   train                False tests the weights that it starts from
#   beside               the dense row that its multiply-adds and times are compared with
#   budgets              with train=False, query ratios that it is tested at, too, by prices that make them on average
#   turn                 what is worth more has its turn sooner
#   seeds
FINETUNE, SCRATCH, SPARSE = ['on', 'dge', 'finetune'], ['whole', 'dge', 'scratch'], ['whole', 'dge', 'sparse']
BUDGETS = {'0.25': 'budget_25', '0.75': 'budget_75', '1': 'budget_100'}
TABLE_1 = {'layer-wise': 'layerwise', '{0, 1}': 'g01', '{1, 2}': 'g12', '{1, 2, 4, 8}': 'g1248'}
NAMES = {'pvt': 'PVT', 'dpvt': 'DPVT', 'deit': 'DeiT'}
DATA = {'tiny-imagenet-50': 'Tiny-ImageNet-50', 'cifar10': 'CIFAR-10'}
ALL_SEEDS, ONE_SEED = dict(seeds=[0, 1, 2]), dict(seeds=[0])
UNTRAINED = ['random', 'entropy', 'correlation']  # the routers

rows = []


def from_dense(folder, base, **start):
    # What the others start from, and what as many iterations more make of it.
    on = dict(base, start=f'{folder}/base')
    return [
        dict(base, name=f'{folder}/base', label='dense, that others start from', **start),
        dict(on, name=f'{folder}/dense', label='dense, trained on', parts=['on']),
        dict(on, name=f'{folder}/dge', label='DGE 0.5, from dense', parts=FINETUNE, beside=f'{folder}/dense'),
    ]


def changed_recipe(folder, base, turn):
    # What is another recipe worth?
    on = dict(base, turn=turn, start=f'{folder}/base', beside=f'{folder}/dense')
    return [
        dict(on, name=f'{folder}/dge-noise', label='DGE 0.5, noise to the end, from dense', parts=[*FINETUNE, 'noise']),
        dict(on, name=f'{folder}/dge-layers', label='DGE 0.5, also by layer, from dense', parts=[*FINETUNE, 'layers']),
    ]


# Turns of dense and fine-tuned models, and of those from scratch; and the seeds of each.
for model, data, turn, seeds, last, last_seeds in (
    ('pvt', 'tiny-imagenet-50', 1, ALL_SEEDS, 5, ALL_SEEDS),
    ('deit', 'tiny-imagenet-50', 2, ALL_SEEDS, 8, ONE_SEED),
    ('pvt', 'cifar10', 6, ALL_SEEDS, 8, ONE_SEED),
    ('deit', 'cifar10', 7, ALL_SEEDS, 9, ONE_SEED),
    ('dpvt', 'tiny-imagenet-50', 7, ALL_SEEDS, 9, ONE_SEED),
    ('dpvt', 'cifar10', 8, ONE_SEED, 9, ONE_SEED),
):
    folder = f'{data}/{model}'
    base = dict(config=f'{model}_{data}.py', table=f'{DATA[data]}: {NAMES[model]}', turn=turn, **seeds)
    late = dict(base, turn=last, beside=f'{folder}/dense', **last_seeds)
    rows += from_dense(folder, base)
    rows += [
        dict(late, name=f'{folder}/scratch-sparse', label='DGE 0.5, from scratch, sparse', parts=SPARSE),
        dict(late, name=f'{folder}/scratch', label='DGE 0.5, from scratch, all branches', parts=SCRATCH),
    ]
    if folder == 'tiny-imagenet-50/pvt':
        rows += changed_recipe(folder, base, 3)
        changed = dict(base, start=f'{folder}/base', turn=6, beside=f'{folder}/dense')
        rows += [
            dict(changed, name=f'{folder}/budget-{budget}', label=f'DGE {budget}, from dense', parts=[*FINETUNE, part])
            for budget, part in BUDGETS.items()
        ]
        rows += [
            dict(changed, name=f'{folder}/{part}', label=f'DGE 0.5, {label}, from dense', parts=[*FINETUNE, part])
            for label, part in TABLE_1.items()
        ]
        # What was trained on with each router is tested at budgets; with the untrained ones the dense model is, too.
        rows += [
            dict(
                changed,
                name=f'{folder}/router-{router}',
                label=f'{router} router 0.5, from dense',
                parts=['on', 'dge', dict(model=dict(backbone=dict(dge=dict(router=router, test_budget=0.5))))],
            )
            for router in UNTRAINED
        ]
        rows += [
            dict(
                base,
                name=f'{folder}/routers/{label.replace(", ", "-").replace(" ", "-")}',
                table=f'{base["table"]}, routers at budgets',
                label=label,
                parts=['dge', dict(model=dict(backbone=dict(dge=dict(router=router))))],
                start=f'{folder}/{start}',
                train=False,
                budgets=[0.5, 0.6, 0.7, 0.8, 0.9],
                beside=f'{folder}/dense',
                turn=turn,
            )
            for label, start, router, turn in (
                *((f'{router}, off the shelf', 'dense', router, 4) for router in UNTRAINED),
                *((f'{router}, fine-tuned', f'router-{router}', router, 6) for router in UNTRAINED),
                ('linear, fine-tuned', 'dge-noise', 'linear', 4),
            )
        ]

EXITS = {0.0: 'coarse', 0.3: 'early exit at 0.3', 0.5: 'early exit at 0.5', 0.7: 'early exit at 0.7'}
# Tables 4, 5, 7 and figure 7 of the CF-ViT paper: options of the backbone.
CHANGES = dict(
    last=('score', 'last', 'class attention of the last block'),
    no_reuse=('reuse', None, 'no feature reuse'),
    linear=('reuse', 'linear', 'reuse by a linear layer'),
    class_token=('reuse', 'class_token', 'reuse with the class token'),
    uninformative=('reuse', 'uninformative', 'reuse with uninformative tokens'),
    beta_0=('ema_decay', 0.0, 'beta 0'),
    beta_50=('ema_decay', 0.5, 'beta 0.5'),
    beta_90=('ema_decay', 0.9, 'beta 0.9'),
    beta_999=('ema_decay', 0.999, 'beta 0.999'),
    all=('alpha', 1.0, 'all patches split'),
)
for data in DATA:
    folder, plain = f'{data}/cf-deit', f'{data}/deit/base'
    base = dict(config=f'cf-deit_{data}.py', table=f'{DATA[data]}: CF-ViT', beside=f'{data}/deit/dense')
    turns = dict(pre=2, scratch=5) if data == 'tiny-imagenet-50' else dict(pre=7, scratch=8)
    seeds = dict(pre=ALL_SEEDS, scratch=ALL_SEEDS if data == 'tiny-imagenet-50' else ONE_SEED)
    pre, scratch = (dict(base, name=f'{folder}/{start}', turn=turn, **seeds[start]) for start, turn in turns.items())
    rows += [
        dict(pre, label='from plain, fine', parts=['on', 'cf_on'], start=plain),
        dict(scratch, label='from scratch, fine', parts=['whole', 'cf_whole']),
    ]
    for start, label in dict(pre='from plain', scratch='from scratch').items():
        tested = dict(base, train=False, start=f'{folder}/{start}', turn=turns[start], **seeds[start])
        rows += [
            dict(
                tested,
                name=f'{folder}/{start}-exit-{threshold}',
                label=f'{label}, {stage}',
                parts=[dict(model=dict(test_cfg=dict(threshold=threshold)))],
            )
            for threshold, stage in EXITS.items()
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
        changed = dict(base, start=plain, turn=9, **ONE_SEED)
        rows += [
            dict(
                changed,
                name=f'{folder}/{name}',
                label=f'from plain, fine, {label}',
                parts=['on', 'cf_on', dict(model=dict(backbone={option: value}))],
            )
            for name, (option, value, label) in CHANGES.items()
        ]
        # Table 8.
        labels = dict(label='from plain, fine, labels teach the coarse stage', name=f'{folder}/ce')
        rows += [dict(changed, **labels, parts=['on', 'cf_on', dict(model=dict(coarse_loss='ce'))])]

for data, title, config in (
    ('camvid', 'CamVid: Semantic FPN with', 'fpn-{}_camvid.py'),
    ('bccd', 'BCCD: Faster R-CNN with', 'faster-rcnn-{}_bccd.py'),
):
    for model, turn, seeds, last, last_seeds in (
        ('pvt', dict(camvid=3, bccd=4)[data], ALL_SEEDS, 6, ALL_SEEDS),
        ('dpvt', 8, ALL_SEEDS, 9, ONE_SEED),
    ):
        folder, pretrained = f'{data}/{model}', f'tiny-imagenet-50/{model}/dense'
        base = dict(config=config.format(model), table=f'{title} {NAMES[model]}', turn=turn, **seeds)
        late = dict(base, turn=last, backbone=pretrained, beside=f'{folder}/dense', **last_seeds)
        rows += from_dense(folder, base, backbone=pretrained)
        if model == 'pvt':
            rows += changed_recipe(folder, base, turn)
        rows += [dict(late, name=f'{folder}/scratch', label='DGE 0.5, from a dense backbone alone', parts=SCRATCH)]

# Models of other libraries, by mmdyn.WithDGE.
for folder, config, table in (
    ('tiny-imagenet-50/timm-vit', 'timm-vit_tiny-imagenet-50.py', "Tiny-ImageNet-50: timm's ViT"),
    ('camvid/mit', 'segformer-mit_camvid.py', "CamVid: mmseg's SegFormer"),
):
    base = dict(config=config, table=table, turn=4, **ALL_SEEDS)
    rows += from_dense(folder, base) + changed_recipe(folder, base, 6)
