"""Make the demo data: handwritten digits on textured canvases, as classification, COCO and ADE20K style folders.

The digits are the 1,797 real ones that scikit-learn ships, so nothing is downloaded. The same arguments give the same
bytes, and no digit of the validation split is ever drawn in the training split.
"""

import argparse
import inspect
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

from mmdyn.engine.command import command

LAYOUTS = ('imagenet', 'coco', 'ade')
TOOL = 'mmdyn make_demo_dataset 1'  # raise the number when the pixels change, so that older data is made again
CLS_SIZE, CLS_SIDES = 64, (40, 52)  # px: side of the canvas, smallest and largest side of a digit
DENSE_SIZE, DENSE_SIDES = 128, (28, 64)
STROKE = 0.35  # a pixel belongs to the digit where its alpha is above this
FINE = 4  # outlines are followed on a grid this many times finer than the pixels
BACKGROUND = 11  # ADE label; 1..10 are the digits 0..9


def split_digits(labels: np.ndarray, seed: int) -> dict:
    """Split the digits 80/20 within each class.

    Args:
        labels: (N,) classes 0..9.
        seed: the dataset's seed.

    Returns:
        {'train': (10 arrays of indices into labels, one per class), 'val': (likewise)}.
    """
    rng = np.random.default_rng([seed, 0])
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    return {'train': [of[len(of) // 5 :] for of in shuffled], 'val': [of[: len(of) // 5] for of in shuffled]}


def _glyph(digit, side):
    """The alpha (h, w) in 0..1 of an 8x8 digit, `side` px for its 8 pixels, cropped to what can be seen of it."""
    # The empty ring lets strokes that touch the border of the 8x8 image fade out instead of ending in a cut.
    length = round(side * 10 / 8)
    alpha = cv2.resize(np.pad(digit / 16, 1), (length, length), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    rows, cols = (np.flatnonzero((alpha > 0.02).any(axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _scene(rng, size, sides, digits):
    """Draw (n, 8, 8) digits on a new canvas.

    Returns the (size, size, 3) uint8 image and one alpha layer (size, size) in 0..1 per digit, None where there was
    no room left for it (never for the first).
    """
    grey = rng.uniform(40, 130)
    texture = cv2.resize(rng.normal(0, 6, (5, 5, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    canvas = grey + rng.uniform(-15, 15, 3) + texture + rng.normal(0, 3, (size, size, 3))
    taken = np.zeros((size, size), bool)
    layers = []
    for digit in digits:
        layers.append(None)
        for _ in range(20):
            alpha = _glyph(digit, rng.integers(*sides, endpoint=True))
            top, left = (rng.integers(size - length, endpoint=True) for length in alpha.shape)
            box = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            if not taken[box].any():
                break
        else:
            continue
        taken[box] = True
        layers[-1] = np.zeros((size, size))
        layers[-1][box] = alpha
        canvas += (grey + rng.uniform(90, 125) + rng.uniform(-15, 15, 3) - canvas) * layers[-1][..., None]
    return canvas.round().clip(0, 255).astype(np.uint8), layers


def _write_png(path, image):
    # Not cv2.imwrite, which only returns False on failure.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1])


def _write_imagenet(root, split, count, rng, images, pools):
    """root/<split>/<class>/*.png, and for val the strokes as 0/255 in root/masks/val/<class>/ by the same names."""
    orders = [rng.permutation(pool) for pool in pools]  # walked round and round: every digit is used equally often
    for i in range(count):
        label = i % 10
        digit = images[orders[label][i // 10 % len(orders[label])]]
        image, (layer,) = _scene(rng, CLS_SIZE, CLS_SIDES, [digit])
        _write_png(root / split / str(label) / f'{i:06d}.png', image)
        if split == 'val':
            _write_png(root / 'masks/val' / str(label) / f'{i:06d}.png', (layer > STROKE).astype(np.uint8) * 255)


def _dense_scenes(count, rng, images, pools):
    """Yield (id from 1, file name, image (128, 128, 3), [(class 0..9, alpha layer (128, 128)), ...])."""
    pairs = [(label, i) for label, pool in enumerate(pools) for i in pool]
    for number in range(1, count + 1):
        labels, chosen = zip(*(pairs[k] for k in rng.choice(len(pairs), rng.integers(1, 5), replace=False)))
        image, layers = _scene(rng, DENSE_SIZE, DENSE_SIDES, images[list(chosen)])
        placed = [(label, layer) for label, layer in zip(labels, layers) if layer is not None]
        yield number, f'{number:012d}.png', image, placed


def _polygons(layer):
    """Outlines of the strokes of an alpha layer: a list of (n, 2) x, y in px, where pixel i spans i..i+1."""
    fine = cv2.resize(layer, None, fx=FINE, fy=FINE, interpolation=cv2.INTER_LINEAR) > STROKE
    contours, tree = cv2.findContours(fine.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    contours = [cv2.approxPolyDP(contour, 1, True)[:, 0] for contour in contours]
    outlines = {i: contour for i, contour in enumerate(contours) if tree[0][i][3] < 0}
    for i, hole in enumerate(contours):
        if i not in outlines and len(hole) > 2:
            # COCO joins the polygons of an object, so the hole of a 0 has to be cut in along a slit from outside.
            outer = outlines[tree[0][i][3]]
            gaps = np.square(outer[:, None] - hole).sum(-1)
            a, b = np.unravel_index(gaps.argmin(), gaps.shape)
            outlines[tree[0][i][3]] = np.concatenate([outer[: a + 1], hole[b:], hole[: b + 1], outer[a:]])
    # What is under a pixel in area is dust that no rasteriser would keep, or less than a triangle.
    return [(outline + 0.5) / FINE for outline in outlines.values() if cv2.contourArea(outline) >= FINE**2]


def _write_coco(root, split, scenes):
    """root/<split>2017/*.png and root/annotations/instances_<split>2017.json."""
    images, annotations = [], []
    for number, name, image, placed in scenes:
        _write_png(root / f'{split}2017' / name, image)
        images.append(dict(id=number, file_name=name, height=DENSE_SIZE, width=DENSE_SIZE))
        for label, layer in placed:
            polygons = _polygons(layer)
            low, high = (edge(np.concatenate(polygons), axis=0) for edge in (np.min, np.max))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=label + 1,
                    iscrowd=0,
                    bbox=[*low.tolist(), *(high - low).tolist()],
                    segmentation=[polygon.ravel().tolist() for polygon in polygons],
                    area=int((layer > STROKE).sum()),
                )
            )
    categories = [dict(id=label + 1, name=str(label), supercategory='digit') for label in range(10)]
    content = dict(info=dict(description=TOOL), images=images, annotations=annotations, categories=categories)
    path = root / f'annotations/instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, sort_keys=True, separators=(',', ':')))


def _write_ade(root, split, scenes):
    """root/images/<split>/*.png and root/annotations/<split>/*.png with the labels 1..11."""
    for _, name, image, placed in scenes:
        labels = np.full((DENSE_SIZE, DENSE_SIZE), BACKGROUND, np.uint8)
        for label, layer in placed:
            labels[layer > STROKE] = label + 1
        _write_png(root / 'images' / split / name, image)
        _write_png(root / 'annotations' / split / name, labels)


def _check(out, seed, **counts):
    for name, count in counts.items():
        least = 10 if name.startswith('cls') else 1
        if count < least:
            why = ', one image for each of the ten classes' if least == 10 else ''
            raise ValueError(
                f'{name} is {count}, but has to be at least {least}{why}. '
                f'Give --{name.replace("_", "-")} {least} or more.'
            )
    if seed < 0:
        raise ValueError(f'seed is {seed}, but has to be 0 or more. Give another --seed.')
    blocker = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocker:
        raise ValueError(
            f'--out {out} cannot be a folder, because {blocker} is a file. '
            'Give a folder, existing or not, or move the file away.'
        )


def make_demo_dataset(
    out: str | Path = 'data/demo',
    seed: int = 0,
    cls_train: int = 4000,
    cls_val: int = 500,
    dense_train: int = 400,
    dense_val: int = 100,
) -> Path:
    """Write the demo data, unless `out` already holds what the same arguments gave.

    Args:
        out: folder for imagenet/, coco/, ade/ and dataset.json. Demo data made with other arguments is replaced.
        seed: 0 or more.
        cls_train, cls_val: number of 64x64 images with one digit each, at least 10.
        dense_train, dense_val: number of 128x128 images with 1 to 4 digits each, at least 1.

    Returns:
        The folder.
    """
    out = Path(out)
    counts = dict(cls_train=cls_train, cls_val=cls_val, dense_train=dense_train, dense_val=dense_val)
    _check(out, seed, **counts)
    record = json.dumps(dict(tool=TOOL, seed=seed, **counts), sort_keys=True, indent=2) + '\n'
    done, begun = out / 'dataset.json', out / 'dataset.json.part'
    if done.is_file() and done.read_text() == record:
        print(f'{out} already holds this dataset, nothing to do')
        return out

    # Only what this tool wrote is ever removed: --out may name a folder in which somebody keeps the real COCO.
    ours = any(path.is_file() and TOOL.rstrip('0123456789') in path.read_text() for path in (done, begun))
    foreign = [name for name in LAYOUTS if (out / name).exists() and not ours]
    if foreign:
        raise ValueError(
            f'{out} holds {", ".join(foreign)}, which this tool did not write and will not replace. '
            'Give another --out, a new or empty folder.'
        )
    out.mkdir(parents=True, exist_ok=True)
    begun.write_text(record)
    done.unlink(missing_ok=True)
    for name in LAYOUTS:
        if (out / name).exists():
            shutil.rmtree(out / name)

    data = load_digits()
    pools = split_digits(data.target, seed)
    for part, (split, long_split) in enumerate((('train', 'training'), ('val', 'validation'))):
        rng = np.random.default_rng([seed, 1, part])
        _write_imagenet(out / 'imagenet', split, counts[f'cls_{split}'], rng, data.images, pools[split])
        for write, name, folder in ((_write_coco, 'coco', split), (_write_ade, 'ade', long_split)):
            # Drawn again from the same seed for each layout: the same canvases, without holding them all in memory.
            rng = np.random.default_rng([seed, 2, part])
            write(out / name, folder, _dense_scenes(counts[f'dense_{split}'], rng, data.images, pools[split]))
    begun.replace(done)
    print(f'{out}: {cls_train} + {cls_val} classification and {dense_train} + {dense_val} dense images written')
    return out


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(make_demo_dataset), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(make_demo_dataset).parameters.items():
        parser.add_argument(
            f'--{name.replace("_", "-")}',
            type=type(parameter.default),
            default=parameter.default,
            help='default: %(default)s',
        )
    make_demo_dataset(**vars(parser.parse_args(argv)))


if __name__ == '__main__':
    main()
