"""The table and plot of time to a loss, from records."""

import pytest
from benchmarks.time_to_loss import draw, reached, table

RESULT = {
    "zero_shot": 4.0,
    "records": [
        {"name": name, "seconds": [10.0 * slow, 20.0 * slow], "losses": losses, "peak_bytes": 2**30, **more}
        for name, slow, losses, more in (
            ("full fine-tuning", 4, [3.0, 2.0], {}),
            ("LoRA on the full model", 3, [3.0, 2.5], {}),
            ("keep 4", 1, [3.6, 3.2], {"packing_seconds": 9.0, "bundle_bytes": 2**20}),
            ("keep 8", 1, [3.4, 2.6], {"packing_seconds": 9.0, "bundle_bytes": 2**20}),
            ("keep 13", 2, [3.0, 2.4], {"packing_seconds": 9.0, "bundle_bytes": 2**20}),
        )
    ],
}


@pytest.mark.parametrize(
    ("loss", "seconds"), [(4.0, 0.0), (3.5, 20.0), (3.0, 40.0), (2.5, 60.0), (1.9, None)], ids=lambda value: f"{value}"
)
def test_seconds_lie_on_lines_between_checkpoints(loss, seconds):
    assert reached(RESULT["records"][0], 4.0, loss) == (seconds if seconds is None else pytest.approx(seconds))


def test_the_table_says_who_never_got_there():
    lines = table(RESULT).splitlines()
    assert lines[0].startswith("Zero-shot 4.000")
    assert "gains 2.000" in lines[0]
    slow = next(line for line in lines if "keep 4" in line)
    assert slow.count("not reached") == 3
    assert "| not reached | not reached | 3.200 | 20 | 1.00 | 9 | 1 |" in slow


def test_the_plot_is_a_picture(tmp_path):
    draw(RESULT, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
