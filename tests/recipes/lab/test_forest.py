"""The plot of all studies reads the reports that are kept."""

from lab.studies import forest


def test_the_differences_are_the_reports():
    text = (forest.RESULTS / "study_dpo_epsilon" / "report.md").read_text()
    found = forest.differences(text)
    assert found["DPO + AGSM", "DPO"] == (0.066, 0.033)
    assert found["DPO + AGSM", "DPO + denoising"].mean < 0


def test_every_row_is_drawn(tmp_path):
    forest.draw(tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000
