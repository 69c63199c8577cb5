"""The realistic patterns cluster as the masks they were fitted to."""

from pathlib import Path

import pytest

from speft_kernels.testing import MEASURED, Clustering, clustering_of, realistic_pattern

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
SHAPES = ((384, 384), (1536, 384), (384, 1536))  # of the layers that were measured


def rows_of_the_table():
    """(metric, density) -> clustering, from "What real masks look like" in docs/design.md."""
    rows = {}
    for line in DESIGN.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        name, _, rest = cells[0].partition(", per layer, ")
        if len(cells) == 5 and rest:
            shares = [float(cell.removesuffix(" %")) / 100 for cell in cells[1:]]
            density = float(rest.removesuffix(" %")) / 100
            rows[name.lower(), density] = Clustering(*shares)
    return rows


def test_the_targets_are_the_table_of_the_design():
    table = rows_of_the_table()
    assert len(table) == 6
    assert table.keys() == MEASURED.keys()
    for key, clustering in table.items():
        # Per cent with two digits, on both sides: the same decimal but for its division by 100.
        assert vars(clustering) == pytest.approx(vars(MEASURED[key]), rel=1e-12), key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("metric", "density"), MEASURED)
def test_realistic_patterns_have_the_measured_clustering(metric, density, shape):
    wanted = MEASURED[metric, density]
    # Fitting moves what the hot lines hold by whole draws: at 0.5 % there are 737 entries at least,
    # of which 1 % are 7. At 0.1 % there are 147, and most of them come first, one on each used
    # line, hot or not: the share that hot lines hold is missed by up to 8 entries. And where the
    # used columns are fewer than 5 % of all (4.6 %, gradient), the top 5 % hold all, not 97 %.
    holds = 0.01 if density >= 0.005 else 0.06
    for seed in range(3):
        pattern = realistic_pattern(shape, density, metric, seed=seed)
        found = clustering_of(pattern)
        assert pattern.nnz == round(density * shape[0] * shape[1])
        # The number of used lines is met exactly, but for its rounding: half a line.
        assert found.used_rows == pytest.approx(wanted.used_rows, abs=0.51 / shape[0])
        assert found.used_columns == pytest.approx(wanted.used_columns, abs=0.51 / shape[1])
        assert found.top_columns_hold == pytest.approx(wanted.top_columns_hold, abs=holds)
        assert found.top_rows_hold == pytest.approx(wanted.top_rows_hold, abs=holds)
