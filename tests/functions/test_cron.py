import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.cron import parse_cron


@pytest.mark.parametrize(
    ("expression", "field", "value"),
    [
        ("*/15 * * * *", "minute", "0,15,30,45"),
        ("0 8-10 * * *", "hour", "8,9,10"),
        ("0 8/6 * * *", "hour", "8,14,20"),
        ("0 0 1,15 * *", "day", "1,15"),
        ("0 0 * JAN-mar *", "month", "1,2,3"),
        ("0 0 * * *", "month", "*"),
        ("0-59 * * * *", "minute", "*"),
        ("0 0 29 2 *", "day", "29"),
        ("0 0 30-31 4 *", "day", "30,31"),
    ],
)
def test_fields_are_expanded(expression: str, field: str, value: str) -> None:
    assert getattr(parse_cron(expression), field) == value


@pytest.mark.parametrize(
    ("weekday", "names"),
    [
        ("1-5", "mon,tue,wed,thu,fri"),
        ("0", "sun"),
        ("7", "sun"),
        ("5-7", "sun,fri,sat"),
        ("mon-fri", "mon,tue,wed,thu,fri"),
        ("0-6", "*"),
        ("*", "*"),
    ],
)
def test_weekdays_are_named_as_cron_counts_them(weekday: str, names: str) -> None:
    assert parse_cron(f"0 8 * * {weekday}").day_of_week == names


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "five fields"),
        ("0 8 * *", "five fields"),
        ("0 0 8 * * *", "five fields"),
        ("@daily", "five fields"),
        ("60 * * * *", "minute from 0 to 59"),
        ("0 24 * * *", "hour from 0 to 23"),
        ("0 0 0 * *", "day of month from 1 to 31"),
        ("0 0 * 13 *", "month from 1 to 12"),
        ("0 0 * * 8", "weekday from 0 to 7"),
        ("0 0 * * xyz", "weekday from 0 to 7"),
        ("0 0 * * mon#2", "weekday such as"),
        ("0 0 * * fri-mon", "goes up"),
        ("*/0 * * * *", "step over 0"),
        ("*-5 * * * *", "goes up"),
        ("1,,2 * * * *", "minute such as"),
        ("-1 * * * *", "minute such as"),
        ("0 0 13 * fri", "not both"),
        ("0 0 31 4 *", "a day that one of its months has"),
        ("0 0 30,31 feb *", "a day that one of its months has"),
        ("0 0 31 2,4,6 *", "a day that one of its months has"),
    ],
)
def test_what_is_no_cron_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cron(expression)


@given(st.text(alphabet="0123456789*/-, monfri", max_size=40))
def test_any_text_is_fields_or_a_value_error(text: str) -> None:
    try:
        fields = parse_cron(text)
    except ValueError:
        return
    again = parse_cron(
        f"{fields.minute} {fields.hour} {fields.day} {fields.month} {fields.day_of_week}"
    )
    assert again == fields
