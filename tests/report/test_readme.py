"""Numbers of README.md that come from a committed report are those of the report."""

import pytest

from tests.report import readme


def test_marked_tables_are_those_of_the_committed_reports():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "python -m tests.report.readme"


def test_blocks_are_taken_by_the_words_of_their_heading(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "t.md").write_text(
        "# T\n\nSays.\n\n### one, 45 %\n\n| a |\n\nNoted.\n\n### two, 35 %\n\n| b |\n\n### x, 45 %\n\n| c |\n"
    )
    text = "before\n<!-- table: t.md, 45 % -->\nold\n<!-- end -->\nafter\n"
    grids = "**one, 45 %**\n\n| a |\n\nNoted.\n\n**x, 45 %**\n\n| c |\n"
    expected = f"before\n<!-- table: t.md, 45 % -->\n\n{grids}\n<!-- end -->\nafter\n"
    assert readme.filled(text) == expected
    assert readme.filled(expected) == expected
    with pytest.raises(ValueError, match="no block with '90 %'"):
        readme.filled(text.replace("45 %", "90 %"))
