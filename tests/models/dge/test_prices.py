import json

import pytest

from mmdyn.models.dge.prices import Prices

TABLE = dict(price=[0.3, 0.1, -0.1], query_ratio=[0.2, 0.4, 0.8], layers=dict(a=[0.1, 0.5, 0.9], b=[0.3, 0.3, 0.7]))


@pytest.mark.parametrize(
    'budget, price, a, b',
    [
        (0.2, 0.3, 0.1, 0.3),
        (0.3, 0.2, 0.3, 0.3),
        (0.4, 0.1, 0.5, 0.3),
        (0.5, 0.05, 0.6, 0.4),
        (0.8, -0.1, 0.9, 0.7),
        (0.197, 0.3, 0.1, 0.3),
        (0.803, -0.1, 0.9, 0.7),
    ],
)
def test_between_two_measurements_all_is_linear(budget, price, a, b):
    """What was calibrated to within a tolerance may be a little beside the budget that was asked."""
    found, layers = Prices.read(TABLE).at(budget)
    assert found == pytest.approx(price) and layers == pytest.approx(dict(a=a, b=b))


def test_one_measurement_and_equal_ones():
    assert Prices.read(dict(price=[0.1], query_ratio=[0.5], layers={})).at(0.5) == (0.1, {})
    assert Prices.read(dict(price=[0.2, 0.1], query_ratio=[0.5, 0.5], layers={})).at(0.5)[0] in (0.1, 0.2)


@pytest.mark.parametrize('budget', [0.1, 0.9])
def test_budgets_that_were_not_measured(budget):
    with pytest.raises(
        ValueError, match=rf'budget={budget} is outside of the query ratios from 0.2000 to 0.8000 for which'
    ):
        Prices.read(TABLE).at(budget)


def test_file_and_what_it_holds(tmp_path):
    (tmp_path / 'prices.json').write_text(json.dumps({**TABLE, 'images': 3}))
    prices = Prices.read(tmp_path / 'prices.json')
    assert prices == Prices.read(TABLE) == Prices.read(prices) == Prices.read(str(tmp_path / 'prices.json'))


@pytest.mark.parametrize(
    'text, reason',
    [
        (None, 'cannot be read: No such file or directory. tools/analysis_tools/sweep_budget.py writes such a file'),
        ('{', 'is no JSON file: '),
        ('[]', 'must have the keys price, query_ratio, layers'),
        (json.dumps(dict(price=[1])), 'must have the keys price, query_ratio, layers'),
        (json.dumps({**TABLE, 'price': [1]}), 'must have as many numbers for each key'),
        (json.dumps({**TABLE, 'query_ratio': [0.4, 0.2, 0.8]}), 'by ascending query_ratio'),
        (json.dumps(dict(price=[], query_ratio=[], layers={})), 'at least one'),
    ],
)
def test_files_that_are_wrong(text, reason, tmp_path):
    if text is not None:
        (tmp_path / 'prices.json').write_text(text)
    with pytest.raises(ValueError, match=reason):
        Prices.read(tmp_path / 'prices.json')
