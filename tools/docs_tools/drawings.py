"""Draw the pictures of docs/images: how DGE and CF-ViT work, and where the demo's model spent its queries.

gates.jpg is made of the pictures that `make demo` leaves; without them it stays as it is.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from mmdyn.engine.command import command, only_results, output_folder

# The granularities' colours are those of draw_gates.py: red is the finest.
COLOURS = {1: '#d9534f', 2: '#5cb85c', 4: '#5b8def'}
GREY, INK = '#d5d9de', '#222222'
TRAINING = dict(
    sparse='the drawn branch runs: cheaper than the dense model,\nbut a logit hears of no other branch',
    dense='all branches run (21 queries for 16 cells), the gate selects:\n'
    'each logit hears what its branch would have done',
)
# Of `make demo`: digits whose gates are shown, and the width of a picture in a row of draw_gates.py.
DIGITS, SIDE, GAP = ('1-000121', '2-000242', '3-000363', '4-000484', '7-000227', '0-000000'), 160, 4


def panel(axes, title: str, limits: tuple[float, float, float, float]) -> None:
    """An empty drawing area of (left, right, bottom, top)."""
    axes.set(xlim=limits[:2], ylim=limits[2:], aspect='equal')
    axes.set_title(title, fontsize=10, color=INK)
    axes.axis('off')


def square(axes, x: float, y: float, side: float, colour: str, line: float = 0.8, alpha: float = 1.0) -> None:
    """A square, from its lower left corner."""
    axes.add_patch(Rectangle((x, y), side, side, facecolor=colour, edgecolor='white', linewidth=line, alpha=alpha))


def caption(axes, x: float, y: float, text: str) -> None:
    """Centred text below a drawing."""
    axes.text(x, y, text, ha='center', va='top', fontsize=8, color=INK)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=11, color=INK, linewidth=1))


def patches(choice: np.ndarray, region: int = 4) -> Iterator[tuple[float, float, int]]:
    """(x, y, granularity) of each query's patch, from the choice of each region, row by row."""
    for (row, column), phi in np.ndenumerate(choice):
        for y in range(0, region, phi):
            for x in range(0, region, phi):
                yield column * region + x, row * region + y, phi


def draw_dge() -> Figure:
    """One layer: the map's regions, the packed queries, and what each cell gets back."""
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    choice = np.array([[4, 2], [4, 1]])
    left, middle, right = figure.subplots(1, 3)
    panel(left, '1  each region chooses a granularity', (-0.5, 8.5, -2.4, 8.5))
    for x, y, phi in patches(choice):
        square(left, x, y, phi, COLOURS[phi], line=1.2)
    for y in range(9):
        left.plot([0, 8], [y, y], color='white', linewidth=0.3)
        left.plot([y, y], [0, 8], color='white', linewidth=0.3)
    caption(
        left,
        4,
        -0.5,
        '64 cells, 4 regions of 4 x 4: the router sees the mean\nof a region and gives a logit'
        ' for 1 x 1, 2 x 2 and 4 x 4',
    )

    panel(middle, "2  the block sees the patches' means", (-0.5, 8.5, -2.4, 8.5))
    queries = sorted(phi for _, _, phi in patches(choice))
    for index, phi in enumerate(queries):
        square(middle, index % 8 + 0.1, 7.1 - index // 8, 0.8, COLOURS[phi])
    for index in range(64):
        square(middle, index % 16 * 0.5 + 0.05, 2.1 - index // 16 * 0.5, 0.4, GREY)
    arrow(middle, (4, 4.9), (4, 2.7))
    middle.text(4.25, 3.8, 'attend to', fontsize=8, color=INK, va='center')
    caption(middle, 4, -0.5, f'{len(queries)} queries in place of 64; keys and values are\nthose of all 64 cells')

    panel(right, "3  each cell gets its query's change", (-0.5, 8.5, -2.4, 8.5))
    for y in range(8):
        for x in range(8):
            square(right, x, y, 1, COLOURS[int(choice[y // 4, x // 4])], alpha=0.35)
    for x, y, phi in patches(choice):
        right.plot(x + phi / 2, y + phi / 2, 'o', color=COLOURS[phi], markersize=2 + phi)
        for end in ((x + 0.5, y + 0.5), (x + phi - 0.5, y + phi - 0.5)) if phi > 1 else ():
            right.plot([x + phi / 2, end[0]], [y + phi / 2, end[1]], color=INK, linewidth=0.5)
    caption(
        right, 4, -0.5, 'cell = cell + (query after the block - query before)\ngranularity 1: exactly the dense block'
    )
    return figure


def draw_training() -> Figure:
    """What runs in training: the drawn branch, or all of them."""
    figure = Figure(figsize=(9, 3.4), layout='constrained')
    for axes, mode in zip(figure.subplots(1, 2), ('sparse', 'dense')):
        panel(axes, f"train_mode='{mode}'", (-3.4, 13, -2.2, 6.6))
        for row, phi in enumerate((1, 2, 4)):
            runs = mode == 'dense' or phi == 2
            colour = INK if runs else '#888888'
            y = 4.6 - 2.2 * row
            for index in range(16 // phi**2):
                square(axes, index % 8 * 0.75, y - index // 8 * 0.75, 0.65, COLOURS[phi] if runs else GREY)
            axes.text(-0.4, y + 0.2, f'{phi} x {phi}', ha='right', va='center', fontsize=9, color=INK)
            axes.text(6.3, y + 0.2, 'block' if runs else 'not run', fontsize=9, va='center', color=colour)
            axes.text(9.4, y + 0.2, f'x {int(phi == 2)}', fontsize=9, va='center', color=colour)
        axes.text(9.4, 6.1, 'gate', fontsize=9, color=INK, va='center')
        caption(axes, 4.8, -0.9, TRAINING[mode])
    return figure


def draw_cfvit() -> Figure:
    """Both stages, and how a coarse patch fits on four fine ones."""
    figure = Figure(figsize=(10, 3.9), layout='constrained')
    informative = np.zeros((7, 7), bool)
    informative[1:6, 1:6] = True  # 25 of 49
    left, middle, right = figure.subplots(1, 3)
    panel(left, '1  coarse: the image at half its side', (-0.5, 7.5, -2.6, 7.5))
    for row, column in np.ndindex(7, 7):
        square(left, column, row, 1, '#8aa4c8' if informative[row, column] else GREY)
    caption(
        left,
        3.5,
        -0.4,
        '112 x 112 pixels, 7 x 7 patches of 16 x 16 and a class token:\n50 tokens. Sure enough?'
        ' Stop here. If not, the patches that\nthe class token attended to most are informative (blue)',
    )
    panel(middle, '2  how a coarse patch fits', (-0.5, 7.5, -2.6, 7.5))
    square(middle, 0, 2.2, 3, '#8aa4c8')
    for x, y in np.ndindex(2, 2):
        square(middle, 4.2 + 1.5 * x, 2.2 + 1.5 * y, 1.5, '#d9534f')
    arrow(middle, (3.1, 3.7), (4.1, 3.7))
    caption(middle, 1.5, 1.9, '16 x 16 pixels of the\nhalved image')
    caption(middle, 5.7, 1.9, '4 x (16 x 16) pixels of\nthe whole image')
    caption(
        middle,
        3.5,
        -0.4,
        'both are 32 x 32 pixels of the picture, and both go\nthrough the same patch embedding;'
        ' an MLP adds what\nthe coarse patch found out to its four',
    )
    panel(right, '3  fine: informative patches are split', (-0.5, 7.5, -2.6, 7.5))
    for row, column in np.ndindex(7, 7):
        if informative[row, column]:
            for x, y in np.ndindex(2, 2):
                square(right, column + x / 2, row + y / 2, 0.5, '#d9534f')
        else:
            square(right, column, row, 1, GREY)
    caption(
        right,
        3.5,
        -0.4,
        '25 x 4 fine patches, 24 coarse ones as they were, a class\n'
        'token: 125 tokens in place of 197. All weights but the\nposition embeddings are those of the coarse stage',
    )
    return figure


def stack_gates(folder: Path) -> np.ndarray | None:
    """Images above what their first layer chose, from the rows of draw_gates.py; None if they are not there."""
    paths = [folder / f'{name}.png' for name in DIGITS]
    if not all(path.is_file() for path in paths):
        return None
    rows = [cv2.imread(str(path)) for path in paths]
    images, gates = (
        np.hstack([row[-SIDE:, start : start + SIDE + GAP] for row in rows])[:, :-GAP]
        for start in (0, 2 * (SIDE + GAP))
    )
    return np.vstack([images, np.full((GAP, images.shape[1], 3), 255, np.uint8), gates])


@command
@only_results
def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='docs/images', help='folder of the pictures')
    parser.add_argument(
        '--gates', type=Path, default='work_dirs/demo/pvt-mini-dge_digits/gates', help='pictures of `make demo`'
    )
    args = parser.parse_args(argv)
    out = output_folder(args.out)
    # The same bytes at each call; text stays text.
    rcParams.update({'svg.hashsalt': 'mmdyn', 'svg.fonttype': 'none', 'font.sans-serif': ['Arial', 'DejaVu Sans']})
    for name, draw in (('dge', draw_dge), ('training', draw_training), ('cfvit', draw_cfvit)):
        draw().savefig(out / f'{name}.svg', metadata=dict(Date=None), facecolor='white')
    gates = stack_gates(args.gates)
    if gates is not None:
        cv2.imwrite(str(out / 'gates.jpg'), gates, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return '\n'.join(str(path) for path in sorted(out.iterdir()))


if __name__ == '__main__':
    main()
