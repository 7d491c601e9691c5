"""The curves of a run: which points they have, and that a picture shows them where they are."""

import re

import pytest

from stagewise.reports.curves import (
    LEARNING,
    LOSS,
    STEPS,
    Line,
    figure,
    line_of,
    number,
    panels_with_points,
    points_of,
    smoothed,
    span_of,
    svg,
    ticks,
    write_pictures,
)

HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.5},
    {"step": 1, "loss": 2.5, "learning_rate": 0.01, "accuracy": 0.5},
    {"step": 4, "loss": 1.5, "learning_rate": 0.0, "accuracy": 1.0},
    {"step": 4, "eval_loss": 2.0, "eval_accuracy": 0.75},
    {"step": 4, "eval_loss": 1.9, "eval_accuracy": 0.8},
    {"step": 4, "train_runtime": 3.0},
]


def test_points_are_by_step_and_the_later_of_two_counts():
    assert points_of(HISTORY, "loss") == [(1, 2.5), (4, 1.5)]
    assert points_of(HISTORY, "eval_loss") == [(0, 3.0), (4, 1.9)]


def test_what_is_no_number_is_no_point():
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1}]
    assert points_of(history, "loss") == [(3, 1.0)]


def test_a_panel_without_points_is_left_out():
    assert [panel.title for panel, _ in panels_with_points(HISTORY, (LOSS, *LEARNING, *STEPS))] == [
        "loss",
        "accuracy: share of pairs in the right order",
        "learning rate",
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.1, 0.95, [0.2, 0.4, 0.6, 0.8]),
        (-3, 3, [-2, 0, 2]),
        (990, 1012, [990, 995, 1000, 1005, 1010]),
        (7, 7, [7]),
    ],
)
def test_axes_are_marked_at_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1.23456, "1.235"),
        (123456.7, "123,457"),
        (0.00001234, "1.23e-05"),
        (-0.5, "-0.5"),
        (2.5e8, "2.5e+08"),
    ],
)
def test_numbers_are_short(value, expected):
    assert number(value) == expected


def test_a_picture_has_its_points_where_they_belong():
    picture = svg("t", [Line("a", [(0, 0.0), (5, 1.0), (10, 0.5)])])
    (line,) = re.findall(r'<polyline class="line0" points="([^"]+)"', picture)
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    # 460 wide with 58 and 14 beside; 250 high with 14 above, 34 below and 6% of the values' range around them
    assert [x for x, _ in points] == [58, 252, 446]
    height, room = 250 - 14 - 34, 1 / 1.12
    expected = [216 - height * (value + 0.06) * room for value in (0.0, 1.0, 0.5)]
    assert [y for _, y in points] == pytest.approx(expected, abs=0.06)
    assert "<title>a, step 5: 1</title>" in picture


def test_the_average_is_exponential_and_without_bias_at_its_start():
    # span 3: a weight of 1/2 for each point of age; (4·1/2 + 8) / 1.5 and (4·1/4 + 8·1/2 + 1) / 1.75
    assert smoothed([(1, 4.0), (2, 8.0), (9, 1.0)], 3) == [(1, 4.0), (2, pytest.approx(20 / 3)), (9, 6 / 1.75)]
    assert smoothed([(1, 2.0), (2, 2.0)], 5) == [(1, 2.0), (2, 2.0)]


def test_the_average_is_tensorboards():
    """Oracle: pandas' adjusted exponential mean, the same formula written elsewhere."""
    pandas = pytest.importorskip("pandas")
    values = [3.0, 2.0, 2.5, 1.0, 1.5, 0.5]
    expected = pandas.Series(values).ewm(span=4, adjust=True).mean().tolist()
    assert [value for _, value in smoothed(list(enumerate(values)), 4)] == pytest.approx(expected)


def test_few_points_and_validation_are_drawn_as_they_are():
    assert [span_of([(0, 0.0)] * count) for count in (1, 11, 12, 40, 200)] == [0, 0, 3, 4, 20]
    history = [{"step": step, "loss": float(step % 2), "eval_loss": float(step % 2)} for step in range(40)]
    assert line_of(history, "loss", "training").span == 4
    assert line_of(history, "eval_loss", "validation").average == []
    assert line_of(history[:11], "loss", "training").average == []
    schedule = [{"step": step, "learning_rate": 1.0 - step / 40} for step in range(40)]
    ((_, (line,)),) = panels_with_points(schedule, STEPS)
    assert line.average == []


def test_a_noisy_line_is_faint_behind_its_average():
    history = [{"step": step, "loss": float(step % 2)} for step in range(40)]
    ((panel, lines),) = panels_with_points(history, (LOSS,))
    page = figure(panel, lines)
    assert re.findall(r'<polyline class="([^"]+)"', page) == ["line0 faint", "line0"]
    bold = re.findall(r'<polyline class="line0" points="([^"]+)"', page)[0].split()
    faint = re.findall(r'<polyline class="line0 faint" points="([^"]+)"', page)[0].split()
    swing = [max(ys) - min(ys) for ys in ([float(p.split(",")[1]) for p in ps[20:]] for ps in (faint, bold))]
    assert swing[1] < swing[0] / 2
    # alternating 0 and 1 with weights (3/5)^age: 1 / (1 + 3/5) at the ones
    assert "training, EMA over 4 points <b>0.625</b>" in page


def test_an_amount_begins_at_zero():
    assert ">0</text>" in svg("GiB", [Line("last", [(1, 5.0), (2, 5.1)])], from_zero=True)
    assert ">0</text>" not in re.sub(
        r'text-anchor="middle">[^<]*', "", svg("GiB", [Line("last", [(1, 5.0), (2, 5.1)])])
    )


def test_one_point_and_a_flat_line_are_drawn():
    for lines in ([Line("a", [(3, 2.0)])], [Line("a", [(1, 0.0), (2, 0.0)])]):
        assert "nan" not in svg("t", lines) and "<polyline" in svg("t", lines)


def test_words_in_a_figure_are_text():
    panel = LOSS.__class__("<b>", (("loss", "<i>"),))
    shown = figure(panel, [Line("<i>", [(1, 2.0)])])
    assert "<b>" not in re.sub(r"<b>2</b>", "", shown) and "<i>" not in shown and "&lt;i&gt;" in shown


def test_pictures_are_written_where_there_is_something_to_see(tmp_path):
    assert [path.name for path in write_pictures(HISTORY, tmp_path)] == ["loss.png", "curves.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "curves.png"))
    other = tmp_path / "other"
    other.mkdir()
    assert write_pictures([{"step": 1, "loss": 2.0, "eval_perplexity": 3.0}], other) == [other / "loss.png"]
    assert write_pictures([], other) == []
