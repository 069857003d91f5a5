import pytest

from mmdyn.visualization import curves


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw trainings, and tell the panels: label of the ordinate -> {label of a line: its points}."""
    figures = []
    monkeypatch.setattr(curves.Figure, 'savefig', lambda figure, path, dpi: figures.append(figure))

    def draw(trainings, metric='mIoU'):
        curves.draw_training(trainings, metric, tmp_path / 'training.png')
        return {
            axes.get_ylabel(): {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
            for axes in figures.pop().axes
        }

    return draw


def test_multiply_adds_have_a_unit_that_can_be_read():
    assert curves.unit_of([0.02, 1.5]) == (1, 'G') and curves.unit_of([0.02, 0.5]) == (1000, 'M')


def test_labels_do_not_hide_each_other():
    axes = curves.Figure().subplots()
    curves.label_points(axes, [(0, 0, 'a'), (0.05, 0.05, 'beside a'), (0.05, 0.9, 'above a'), (1, 1, 'b')])
    assert [text.get_text() for text in axes.texts] == ['a', 'above a', 'b']


TRAINING = {
    'loss': [(50, 3.0), (100, 2.0)],
    'query_ratio': [(50, 1.0), (100, 0.5)],
    'budget': [(50, 0.75), (100, 0.5)],
    'query_ratio/blocks.0': [(100, 0.25)],
    'query_ratio/blocks.1': [(100, 0.75)],
}


def test_layers_of_a_training_have_names(drawn):
    panels = drawn(dict(a=TRAINING))
    assert panels == {
        'loss': {'a': [[50, 3], [100, 2]]},
        'query ratio': {
            'a': [[50, 1], [100, 0.5]],
            'a, budget': [[50, 0.75], [100, 0.5]],
            'blocks.0': [[100, 0.25]],
            'blocks.1': [[100, 0.75]],
        },
    }


def test_trainings_beside_each_other(drawn):
    """Of a dense one there is no query ratio; layers are faint, without names."""
    panels = drawn(dict(a=TRAINING, dense=dict(loss=[(50, 1.0)], mIoU=[(50, 30.0)])))
    assert list(panels) == ['loss', 'mIoU', 'query ratio; faint: each layer']
    assert panels['mIoU'] == {'dense': [[50, 30]]} and set(panels['loss']) == {'a', 'dense'}
    names = [name for name in panels['query ratio; faint: each layer'] if not name.startswith('_')]
    assert names == ['a', 'a, budget']
