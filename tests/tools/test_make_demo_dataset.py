import hashlib
import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

PATH = Path(__file__).parents[2] / 'tools/dataset_tools/make_demo_dataset.py'
SMALL = dict(cls_train=25, cls_val=20, dense_train=12, dense_val=8)
ADE = dict(train='training', val='validation')


def load_tool():
    spec = importlib.util.spec_from_file_location('make_demo_dataset', PATH)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def tool():
    return load_tool()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return load_tool().make_demo_dataset(tmp_path_factory.mktemp('demo') / 'deep/er', **SMALL)


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*')
        if path.is_file()
    }


def mtimes(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def read(path):
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None and image.dtype == np.uint8
    return image


def rasterise(polygons, scale=8):
    """Pixels (128, 128) whose centre lies in any of the polygons of an object."""
    inside = np.zeros((128, 128), bool)
    for polygon in polygons:
        fine = np.zeros((128 * scale, 128 * scale), np.uint8)
        points = np.array(polygon).reshape(-1, 2) * scale - 0.5
        cv2.fillPoly(fine, [points.round().astype(np.int32)], 1)
        inside |= fine[scale // 2 :: scale, scale // 2 :: scale] > 0
    return inside


def coco(folder, split):
    return json.loads((folder / f'coco/annotations/instances_{split}2017.json').read_text())


def instances(folder, split):
    """(annotation, ADE labels (128, 128) of its image) for every digit."""
    content = coco(folder, split)
    names = {image['id']: image['file_name'] for image in content['images']}
    labels = {number: read(folder / f'ade/annotations/{ADE[split]}' / name) for number, name in names.items()}
    return [(annotation, labels[annotation['image_id']]) for annotation in content['annotations']]


def test_same_arguments_same_bytes(tool, made, tmp_path):
    assert tree(tool.make_demo_dataset(tmp_path / 'other', **SMALL)) == tree(made)


def test_other_seed_other_images(tool, made, tmp_path):
    first, second = tree(made), tree(tool.make_demo_dataset(tmp_path, seed=1, **SMALL))
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] == second[name]]


def test_more_images_leave_the_others_as_they_are(tool, made, tmp_path):
    more = tree(tool.make_demo_dataset(tmp_path, **{**SMALL, 'cls_train': 30, 'dense_train': 13}))
    changed = {name for name, digest in tree(made).items() if more[name] != digest}
    assert changed == {'dataset.json', 'coco/annotations/instances_train2017.json'}


def test_split_is_stratified_and_complete(tool):
    labels = load_digits().target
    pools = tool.split_digits(labels, seed=0)
    train, val = np.concatenate(pools['train']), np.concatenate(pools['val'])
    assert sorted([*train, *val]) == list(range(1797))
    assert all((labels[pool] == label).all() for pools in pools.values() for label, pool in enumerate(pools))
    assert all(0.19 < len(v) / (len(v) + len(t)) <= 0.2 for t, v in zip(pools['train'], pools['val']))
    assert not np.array_equal(val, np.concatenate(tool.split_digits(labels, seed=1)['val']))


def test_validation_digits_are_never_drawn_in_training(tool, tmp_path, monkeypatch):
    scene, drawn, sizes = tool._scene, [set()], [0]

    def spy(rng, size, sides, digits):
        if size < sizes[-1]:  # all of training is written before validation, small canvases first
            drawn.append(set())
        sizes.append(size)
        drawn[-1].update(np.asarray(digit).tobytes() for digit in digits)
        return scene(rng, size, sides, digits)

    monkeypatch.setattr(tool, '_scene', spy)
    tool.make_demo_dataset(tmp_path, cls_train=200, cls_val=200, dense_train=20, dense_val=20)
    train, val = drawn
    assert len(train) > 200 and len(val) > 190
    assert not train & val


@pytest.mark.parametrize('split', ('train', 'val'))
def test_classification_counts_sizes_and_balance(made, split):
    per_class = [list((made / f'imagenet/{split}/{label}').iterdir()) for label in range(10)]
    assert len(list((made / f'imagenet/{split}').iterdir())) == 10
    counts = [len(paths) for paths in per_class]
    assert sum(counts) == SMALL[f'cls_{split}'] and max(counts) - min(counts) <= 1
    assert all(read(path).shape == (64, 64, 3) for paths in per_class for path in paths)


def test_every_validation_image_has_a_mask_of_its_digit(made):
    images, masks = made / 'imagenet/val', made / 'imagenet/masks/val'
    assert tree(images).keys() == tree(masks).keys()
    for name in tree(images):
        image, mask = read(images / name).astype(float), read(masks / name)
        assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, 255}
        stroke, surround = mask > 0, cv2.dilate(mask, np.ones((9, 9))) == 0
        assert 25 <= np.ptp(np.nonzero(stroke)[0]) <= 54
        assert abs(image[stroke].mean() - image[surround].mean()) > 30


@pytest.mark.parametrize('split', ('train', 'val'))
def test_dense_counts_sizes_and_layout(made, split):
    content = coco(made, split)
    count = SMALL[f'dense_{split}']
    files = {image['file_name'] for image in content['images']}
    assert len(files) == len(content['images']) == count
    assert [category['id'] for category in content['categories']] == list(range(1, 11))
    assert [category['name'] for category in content['categories']] == list('0123456789')
    assert all((image['height'], image['width']) == (128, 128) for image in content['images'])
    for folder in (f'coco/{split}2017', f'ade/images/{ADE[split]}', f'ade/annotations/{ADE[split]}'):
        assert {path.name for path in (made / folder).iterdir()} == files
    assert tree(made / f'coco/{split}2017') == tree(made / f'ade/images/{ADE[split]}')
    for name in files:
        assert read(made / f'coco/{split}2017' / name).shape == (128, 128, 3)
        labels = read(made / f'ade/annotations/{ADE[split]}' / name)
        assert labels.shape == (128, 128) and labels.min() >= 1 and labels.max() == 11
    per_image = np.bincount([annotation['image_id'] for annotation in content['annotations']])[1:]
    assert len(per_image) == count and set(per_image) <= {1, 2, 3, 4} and len(set(per_image)) > 1
    assert len({annotation['id'] for annotation in content['annotations']}) == per_image.sum()


@pytest.mark.parametrize('split', ('train', 'val'))
def test_coco_boxes_bound_their_polygons(made, split):
    for annotation, _ in instances(made, split):
        x, y, width, height = annotation['bbox']
        assert 0 <= x < x + width <= 128 and 0 <= y < y + height <= 128
        assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in annotation['segmentation'])
        rows, cols = np.nonzero(rasterise(annotation['segmentation']))
        bounds = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        assert np.abs(np.subtract(bounds, [x, y, x + width, y + height])).max() <= 1
        assert annotation['iscrowd'] == 0


@pytest.mark.parametrize('split', ('train', 'val'))
def test_coco_polygons_agree_with_the_ade_labels(made, split):
    joined = {}
    for annotation, labels in instances(made, split):
        pixels = rasterise(annotation['segmentation'])
        assert (labels[pixels] == annotation['category_id']).mean() > 0.95
        assert annotation['area'] == pytest.approx(pixels.sum(), rel=0.1)
        union = joined.setdefault((annotation['image_id'], annotation['category_id']), (np.zeros_like(pixels), labels))
        union[0][pixels] = True
    for (_, category), (pixels, labels) in joined.items():
        assert (pixels & (labels == category)).sum() / (pixels | (labels == category)).sum() > 0.9
    for labels in {id(labels): labels for _, labels in joined.values()}.values():
        found = {category for (_, category), (_, of) in joined.items() if of is labels}
        assert set(np.unique(labels)) == found | {11}


def test_polygons_keep_holes_and_drop_dust(tool):
    layer = np.zeros((128, 128))
    layer[10:50, 10:50] = 1
    layer[20:30, 20:40] = layer[35:45, 20:40] = 0  # two holes
    layer[60:80, 60:80] = 1
    layer[100, 100] = 0.4
    polygons = tool._polygons(layer)
    assert len(polygons) == 2
    assert (rasterise(polygons) != (layer > 0.5)).mean() < 0.01


def test_second_call_does_nothing(tool, tmp_path, capsys):
    tool.make_demo_dataset(tmp_path, **SMALL)
    before = mtimes(tmp_path)
    capsys.readouterr()
    assert tool.make_demo_dataset(tmp_path, **SMALL) == tmp_path
    assert mtimes(tmp_path) == before
    assert 'already' in capsys.readouterr().out


def test_other_arguments_remake(tool, made, tmp_path):
    tool.make_demo_dataset(tmp_path, seed=3, cls_train=40, cls_val=30, dense_train=15, dense_val=2)
    (tmp_path / 'notes.txt').write_text('not of this tool')
    tool.make_demo_dataset(tmp_path, **SMALL)
    remade = tree(tmp_path)
    assert remade.pop('notes.txt')
    assert remade == tree(made)


@pytest.mark.parametrize('first_seed', (0, 1))
def test_interrupted_run_is_redone(tool, made, tmp_path, monkeypatch, first_seed):
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(tool, '_write_ade', interrupt)
        with pytest.raises(KeyboardInterrupt):
            tool.make_demo_dataset(tmp_path, seed=first_seed, **SMALL)
    assert (tmp_path / 'imagenet').exists() and not (tmp_path / 'dataset.json').exists()
    assert tree(tool.make_demo_dataset(tmp_path, **SMALL)) == tree(made)


def test_folders_of_somebody_else_are_kept(tool, tmp_path):
    picture = tmp_path / 'coco/train2017/000000000009.jpg'
    picture.parent.mkdir(parents=True)
    picture.write_text('somebody took this')
    with pytest.raises(ValueError, match='holds coco, which this tool did not write.*Give another --out'):
        tool.make_demo_dataset(tmp_path, **SMALL)
    assert list(tree(tmp_path)) == ['coco/train2017/000000000009.jpg']


@pytest.mark.parametrize(
    'name, count, least',
    (('cls_train', 0, 10), ('cls_train', 9, 10), ('cls_val', -1, 10), ('dense_train', 0, 1), ('dense_val', -3, 1)),
)
def test_wrong_counts(tool, tmp_path, name, count, least):
    option = name.replace('_', '-')
    with pytest.raises(ValueError, match=f'{name} is {count}, .* at least {least}.*--{option} {least} or more'):
        tool.make_demo_dataset(tmp_path / 'demo', **{**SMALL, name: count})
    assert not (tmp_path / 'demo').exists()


def test_wrong_seed(tool, tmp_path):
    with pytest.raises(ValueError, match='seed is -1, .* 0 or more'):
        tool.make_demo_dataset(tmp_path, seed=-1)


@pytest.mark.parametrize('inside', ('', 'deeper/still'))
def test_out_is_a_file(tool, tmp_path, inside):
    (tmp_path / 'taken').write_text('a file')
    with pytest.raises(ValueError, match='taken is a file. Give a folder'):
        tool.make_demo_dataset(tmp_path / 'taken' / inside, **SMALL)


def test_command_line(tool, made, tmp_path):
    tool.main(
        [
            '--out',
            str(tmp_path / 'demo'),
            '--seed',
            '0',
            *(word for name, count in SMALL.items() for word in (f'--{name.replace("_", "-")}', str(count))),
        ]
    )
    assert tree(tmp_path / 'demo') == tree(made)
