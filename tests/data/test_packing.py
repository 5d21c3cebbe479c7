"""Windows and packing, by hand and by law: every token is a target exactly once."""

import itertools
import random

import numpy as np
import pytest

from jaxlm.data.packing import Packed, Windows, best_fit_decreasing, cut, stack

BOS, EOS = 90, 99


def stream_of(lengths):
    """Documents of the given lengths (end of text included), their tokens numbered from 0 through the stream."""
    offsets = np.cumsum([0, *lengths])
    stream = np.arange(offsets[-1], dtype=np.uint16)
    stream[offsets[1:] - 1] = EOS
    return stream, offsets


def test_windows_by_hand():
    # Two documents, 10 11 12 and 20 21, each ended by 99.
    stream = np.array([10, 11, 12, 99, 20, 21, 99], np.uint16)
    batch = stack(list(Windows(stream, 3, BOS, EOS)))
    np.testing.assert_array_equal(batch["tokens_BL"], [[90, 10, 11], [12, 99, 20], [21, 99, 99]])
    np.testing.assert_array_equal(batch["targets_BL"], [[10, 11, 12], [99, 20, 21], [99, 99, 99]])
    np.testing.assert_array_equal(batch["weights_BL"], [[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    assert set(batch) == {"tokens_BL", "targets_BL", "weights_BL"}
    assert [batch[name].dtype for name in ("tokens_BL", "targets_BL", "weights_BL")] == [np.int32, np.int32, np.float32]


def test_packed_by_hand():
    # Lengths 2, 7, 3 in rows of 5. The second is cut into 5 + 2; then by decreasing length:
    # [5] fills a row; [3] opens one; of the two [2], the first document comes first and joins the 3; the other opens a third.
    stream = np.array([1, 99, 20, 21, 22, 23, 24, 25, 99, 31, 32, 99], np.uint16)
    rows = Packed(stream, np.array([0, 2, 9, 12]), 5, BOS, EOS)
    batch = stack([rows[i] for i in range(len(rows))])
    np.testing.assert_array_equal(batch["tokens_BL"], [[90, 20, 21, 22, 23], [90, 31, 32, 90, 1], [24, 25, 99, 99, 99]])
    np.testing.assert_array_equal(batch["targets_BL"], [[20, 21, 22, 23, 24], [31, 32, 99, 1, 99], [25, 99, 99, 99, 99]])
    np.testing.assert_array_equal(batch["segments_BL"], [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions_BL"], [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["weights_BL"], [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert [batch[name].dtype for name in ("segments_BL", "positions_BL")] == [np.int32, np.int32]


def test_best_fit_decreasing_by_hand():
    # Capacity 10: 7 and 6 open bins 0 and 1; 4 fits only with 6; 3 goes to the fullest with room (7); 2 opens bin 2.
    order, bounds = best_fit_decreasing(np.array([3, 7, 2, 4, 6]), 10)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [[1, 0], [4, 3], [2]]


def test_best_fit_is_the_fullest_bin_with_room_not_the_first():
    # 6 leaves 4, 7 leaves 3: the 3 belongs to the 7 although both have room.
    order, bounds = best_fit_decreasing(np.array([7, 6, 3, 4]), 10)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [[0, 2], [1, 3]]


def test_best_fit_agrees_with_a_plain_search():
    rng = random.Random(0)
    for _ in range(50):
        capacity = rng.randrange(1, 80)
        sizes = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(60))]
        left = []
        for size in sorted(sizes, reverse=True):
            room, chosen = min(((r, i) for i, r in enumerate(left) if r >= size), default=(capacity, len(left)))
            left[chosen : chosen + 1] = [room - size]
        order, bounds = best_fit_decreasing(np.array(sizes, int), capacity)
        filled = [sum(sizes[i] for i in order[a:b]) for a, b in itertools.pairwise(bounds)]
        assert sorted(order.tolist()) == list(range(len(sizes)))
        assert all(0 < f <= capacity for f in filled)
        assert sorted(capacity - f for f in filled) == sorted(left)


def test_cut_by_hand():
    starts, stops, first = cut(np.array([0, 2, 9, 14]), 5)
    assert starts.tolist() == [0, 2, 7, 9]
    assert stops.tolist() == [2, 7, 9, 14]
    assert first.tolist() == [True, True, False, True]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 1000])
def test_every_token_is_a_target_exactly_once(length):
    rng = random.Random(length)
    stream, offsets = stream_of([rng.randrange(1, 40) for _ in range(50)])
    stream = np.arange(len(stream), dtype=np.uint16)  # each position its own token: its number
    for rows in (Windows(stream, length, 60000, 60001), Packed(stream, offsets, length, 60000, 60001)):
        batch = stack([rows[i] for i in range(len(rows))])
        scored = batch["weights_BL"] > 0
        assert sorted(batch["targets_BL"][scored].tolist()) == stream.tolist()
        tokens, targets = batch["tokens_BL"][scored], batch["targets_BL"][scored]
        begins = set(offsets.tolist()) if isinstance(rows, Packed) else {0}
        assert all(before == (60000 if t in begins else t - 1) for before, t in zip(tokens.tolist(), targets.tolist(), strict=True))


def test_a_segment_is_one_piece_of_one_document():
    stream, offsets = stream_of([3, 12, 1, 4, 9, 2, 2])
    numbered = np.arange(len(stream), dtype=np.uint16)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    rows = Packed(numbered, offsets, 6, 60000, 60001)
    for i in range(len(rows)):
        row = rows[i]
        used = row["segments"] > 0
        assert used.tolist() == (row["weights"] > 0).tolist() == sorted(used.tolist(), reverse=True)
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            targets = row["targets"][here]
            assert len(set(owner[targets].tolist())) == 1
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert targets.tolist() == list(range(targets[0], targets[0] + len(targets)))


def test_blank_rows_have_no_weight():
    stream, offsets = stream_of([3, 4])
    for rows in (Windows(stream, 4, BOS, EOS), Packed(stream, offsets, 4, BOS, EOS)):
        blank = rows.blank()
        assert set(blank) == set(rows[0])
        assert not blank["weights"].any() and (blank["tokens"] == EOS).all()
        assert not blank.get("segments", np.zeros(1)).any()


def test_a_batch_spells_its_axes():
    """Scalars, rows, options of a choice, names that say their own letters, rows inside rows."""
    row = {
        "labels": np.int32(3),
        "tokens": np.arange(4, dtype=np.int32),
        "choices": np.zeros((2, 4), np.int32),
        "labels_C": np.ones(5, np.float32),
        "states_LD": np.ones((4, 6), np.float32),
        "token_types": np.zeros(4, np.int32),
        "encoder": {"tokens": np.arange(3), "label": np.array(1.5, np.float32)},
    }
    batch = stack([row] * 3)
    shapes = {name: value.shape for name, value in batch.items() if name != "encoder"}
    assert shapes == {
        "labels_B": (3,), "tokens_BL": (3, 4), "choices_BOL": (3, 2, 4), "labels_BC": (3, 5), "states_BLD": (3, 4, 6),
        "token_types_BL": (3, 4),
    }  # fmt: skip
    assert {name: value.shape for name, value in batch["encoder"].items()} == {"tokens_BL": (3, 3), "label_B": (3,)}
    assert batch["labels_B"].dtype == np.int32 and batch["encoder"]["label_B"].dtype == np.float32
    with pytest.raises(AssertionError, match="must spell its letters"):
        stack([{"x": np.zeros((2, 2, 2))}])
    with pytest.raises(AssertionError, match="labels_C has 0 axes"):
        stack([{"labels_C": np.int32(1)}])
