import base64
import json
import re

import cv2
import numpy as np
import pytest

from mmdyn.visualization.page import data_uri, finite, report_page


def read(uri):
    kind, content = re.fullmatch(r'data:image/(png|jpeg);base64,(.+)', uri).groups()
    return kind, cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def test_small_images_stay_as_they_are_and_large_ones_nearly():
    small = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    kind, image = read(data_uri(small))
    assert kind == 'png' and np.array_equal(image, small)
    large = np.zeros((200, 100, 3), np.uint8)
    large[..., 0] = 250  # red
    kind, image = read(data_uri(large))
    assert kind == 'jpeg' and image.shape == large.shape and np.abs(image.astype(int) - large).max() < 10


def test_numbers_that_json_does_not_have():
    assert finite(dict(a=[float('nan'), 1.5], b=(float('inf'), 'x'), c=dict(d=None))) == dict(
        a=[None, 1.5], b=[None, 'x'], c=dict(d=None)
    )


@pytest.mark.parametrize('name', ['</script><script>alert(1)</script>', '{{report}}', 'a & b <i>'])
def test_names_are_text(name):
    page = report_page(dict(title=name, points=[dict(value=float('nan'))]))
    (content,) = re.findall('<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    report = json.loads(content)
    assert report['title'] == name and report['points'] == [dict(value=None)]
    assert report['colours'][:3] == ['#e63c3c', '#3cc850', '#3c64e6']
    assert page.count('<script') == 2


def test_page_needs_nothing_beside_itself():
    page = report_page(dict(title='x'))
    addresses = re.findall(r'(?:src|href|url|import|fetch)\s*[=(]\s*["\']?([^\s"\')]+)', page)
    assert [address for address in addresses if '//' in address] == []
    assert "default-src 'none'" in page and '<link' not in page
