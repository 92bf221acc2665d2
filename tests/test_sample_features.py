"""Which images and cells k-means learns from: a share of the images, evenly spread; the others are not read."""

from types import SimpleNamespace

import numpy as np
import pytest

from semdict.pipeline.kmeans.sample_features import Wanted, points_per_row, read_rows


@pytest.mark.parametrize(("share", "count"), [(1.0, 1000), (0.2, 200), (0.001, 1), (1e-9, 1)])
def test_a_share_of_the_images_is_read_evenly_spread(share, count):
    rows = np.arange(500, 1500)
    read = read_rows(rows, share)
    assert len(read) == count == len(np.unique(read)) and np.isin(read, rows).all()
    if count > 1:
        assert np.ptp(np.diff(read)) <= 1, "equal steps"
    assert np.array_equal(read_rows(rows, 1.0), rows) and len(read_rows(rows[:0], share)) == 0


def test_fewer_images_give_as_many_points():
    assert points_per_row(1000, 3300, 256).sum() == 3300 == points_per_row(200, 3300, 256).sum()


def test_images_without_a_point_count_as_unreadable_and_others_keep_their_status():
    manifest = SimpleNamespace(status=np.array([0, 0, 3, 0], np.uint8), key=str)
    wanted = Wanted(manifest, np.array([2, 0, 5, 1]))
    assert (wanted.status == 0).tolist() == [True, False, False, True] and wanted.status[2] == 3
    assert manifest.status.tolist() == [0, 0, 3, 0] and wanted.key(3) == "3"
