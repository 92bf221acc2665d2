"""Tables between marks: only what lies between them changes, and a lost mark is told."""

import pytest

from semdict.marked import rewrite, with_blocks

DOCUMENT = "before\n<!-- one -->\nold\n<!-- end one -->\nmiddle <!-- two -->\n<!-- end two --> after\n"


def test_only_the_named_block_changes():
    found = with_blocks(DOCUMENT, {"one": "new\nlines\n"})
    assert found == DOCUMENT.replace("old\n", "new\nlines\n")
    assert with_blocks(found, {"one": "new\nlines\n"}) == found, "made again, nothing changes"


def test_several_blocks_whatever_they_say():
    found = with_blocks(DOCUMENT, {"two": "\\1 {x}\n", "one": ""})
    assert found == "before\n<!-- one -->\n<!-- end one -->\nmiddle <!-- two -->\n\\1 {x}\n<!-- end two --> after\n"


@pytest.mark.parametrize("lost", ["<!-- one -->\n", "<!-- end one -->"])
def test_a_lost_mark_is_told_and_the_file_left_alone(tmp_path, lost):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT.replace(lost, ""))
    with pytest.raises(ValueError, match=r"README\.md: no <!-- one --> \.\.\. <!-- end one -->"):
        rewrite(path, {"one": "new"})
    assert path.read_text() == DOCUMENT.replace(lost, "")
    assert [found.name for found in tmp_path.iterdir()] == ["README.md"]


def test_marks_the_wrong_way_round_are_told():
    with pytest.raises(ValueError, match="no <!-- one -->"):
        with_blocks("<!-- end one -->\n<!-- one -->\n", {"one": ""})
