"""Generated tables in documents: only the text between the comment lines changes, a missing line is an error."""

import pytest

from tools.doc_tables import replace_tables, rewrite

DOCUMENT = "before\n<!-- one -->\nold\n<!-- end one -->\nmiddle <!-- two -->\n<!-- end two --> after\n"


def test_only_the_named_table_changes():
    document = replace_tables(DOCUMENT, {"one": "new\nlines\n"})
    assert document == DOCUMENT.replace("old\n", "new\nlines\n")
    assert replace_tables(document, {"one": "new\nlines\n"}) == document, "a second time changes nothing"


def test_several_tables_with_special_characters():
    document = replace_tables(DOCUMENT, {"two": "\\1 {x}\n", "one": ""})
    assert document == "before\n<!-- one -->\n<!-- end one -->\nmiddle <!-- two -->\n\\1 {x}\n<!-- end two --> after\n"


@pytest.mark.parametrize("line", ["<!-- one -->\n", "<!-- end one -->"])
def test_a_missing_comment_line_is_an_error_and_the_file_stays_as_it_is(tmp_path, line):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT.replace(line, ""))
    with pytest.raises(ValueError, match=r"README\.md: no <!-- one --> \.\.\. <!-- end one -->"):
        rewrite(path, {"one": "new"})
    assert path.read_text() == DOCUMENT.replace(line, "")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_comment_lines_in_the_wrong_order_are_an_error():
    with pytest.raises(ValueError, match="no <!-- one -->"):
        replace_tables("<!-- end one -->\n<!-- one -->\n", {"one": ""})
