"""The record of a run."""

import json

from lmu_hf.record import as_text


def test_a_record_reads_well_and_says_the_same():
    content = {
        "numbers": [1, -2.5, 3e-07, None],
        "rows": [[1, 2], [3, 4]],
        "one": [5],
        "empty": [],
        "words": ["[\n  1\n]", "a"],
        "mixed": [1, "b"],
        "history": [{"epoch": 1.0, "loss": 0.5}],
    }
    text = as_text(content)
    assert json.loads(text) == content
    assert '"numbers": [1, -2.5, 3e-07, null],' in text
    assert text.count("[1, 2]") == 1
    assert '"one": [5],' in text
