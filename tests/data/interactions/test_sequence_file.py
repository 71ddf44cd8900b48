import numpy as np

from jaxops.data.interactions.sequences import read_sequences


def test_a_line_is_a_user_in_order(tmp_path):
    path = tmp_path / "seq.txt"
    path.write_text("10 7 5 7 100\n\n9 100  5\t20\n")
    inter = read_sequences(path)
    assert inter.user_ids.originals([0, 1]).tolist() == [9, 10]
    assert inter.item_ids.originals(inter.item).tolist() == [100, 5, 20, 7, 5, 7, 100]
    np.testing.assert_array_equal(inter.lengths, [3, 4])
    assert not inter.timed
    assert inter.dropped == {}


def test_tokens_are_strings_unless_all_are_integers(tmp_path):
    path = tmp_path / "seq.txt"
    path.write_text("1 8 B00X\n2 007\n")
    inter = read_sequences(str(path))
    assert (inter.user_ids.kind, inter.item_ids.kind) == ("integer", "string")
    assert inter.item_ids.originals(inter.item).tolist() == ["8", "B00X", "007"]
