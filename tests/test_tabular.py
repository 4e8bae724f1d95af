"""The writer of tables: what a cell holds does not break its table."""

from fp8repro.tabular import aligned, comma_separated, markdown


def test_aligned_columns_end_where_the_text_ends() -> None:
    rows = [("a", "1.50"), ("longer", "")]
    assert aligned(("name", "x"), rows) == "name    x\n------  ----\na       1.50\nlonger"
    assert aligned(("name", "x"), rows, "plain") == "name    x\na       1.50\nlonger"


def test_numbers_stay_the_texts_they_are_and_bars_are_escaped() -> None:
    lines = markdown(("a|b", "n"), [("x|y", "0.10"), ("", "1e5")]).splitlines()
    assert [
        [cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]] for line in (lines[0], *lines[2:])
    ] == [
        ["a/b", "n"],
        ["x/y", "0.10"],
        ["", "1e5"],
    ]


def test_what_a_row_lacks_is_empty() -> None:
    assert comma_separated(("a", "b"), [{"a": 1}, {"a": "x,y", "b": 0.5}]) == 'a,b\n1,\n"x,y",0.5\n'
