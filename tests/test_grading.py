"""What generated text is read as."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_interp.questions import canonical_number, grade

LETTERS = [
    ("B", "B"),
    ("B.", "B"),
    ("B) because iron rusts", "B"),
    ("(B)", "B"),
    (" **B**", "B"),
    ("**B) rain**", "B"),
    ("B\n\nRain is water.", "B"),
    ("The answer is (B)", "B"),
    ("The answer is B because A is wrong.", "B"),
    ("The correct answer is: **B**", "B"),
    ("Answer: B", "B"),
    ("The correct option is option B.", "B"),
    (r"So the answer is $\boxed{B}$.", "B"),
    ("**Answer:** \\boxed{\\text{B}}", "B"),
    ("Let me think.\nB. rain", "B"),
    ("I would choose B.", "B"),
    ("(B) is correct.", "B"),
    ("A looks right, but B is the correct answer.", "B"),
    ("The answer is A. Wait: the answer is B.", "B"),  # a correction counts
    ("B. rain\nA. is too dry", "B"),
    ("A because it is a force.", "A"),
    ("A", "A"),
    ("A force is a push or a pull.", None),  # the article
    ("The answer is A force that acts on a body.", None),
    ("Answer: A large force, so B is correct.", "B"),
    ("I think it is hard to say.", None),
    ("A. fog\nB. rain\nC. wind\nD. snow", None),  # the choices again: no answer
    ("A. fog\nB. rain\n\nThe correct answer is B", "B"),
    ("Diamonds are made of carbon (C).", None),
    ("Because Carbon burns", None),
    ("E", None),  # beyond the choices
    ("The answer is E. No: option B.", "B"),
    ("the answer is a", None),
    ("C++ and D-glucose are B's", None),
    ("", None),
    ("?!", None),
]


@pytest.mark.parametrize(("text", "answer"), LETTERS)
def test_letters(text, answer):
    assert grade("choice", text, 4) == answer


WEATHER = ("fog", "rain and wind", "heavy rain", "rain")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B) rain", "D"),  # what is quoted counts, not the letter in front
        ("The correct answer is A) Heavy rain.", "C"),
        ("A) Rain and wind.", "B"),  # the longest quotation
        ("A. fog is thick", "A"),
        ("C is correct", "C"),  # nothing quoted
        ('The answer is "rain".', "D"),
        ("It is heavy rain.", "C"),
        ("Either fog or rain.", None),  # two are named
        ("It rained", None),  # whole words only
        ("A. fog\nB. rain and wind\nC. heavy rain\nD. rain", None),
    ],
)
def test_a_quoted_choice_counts_before_its_letter(text, answer):
    assert grade("choice", text, 4, WEATHER) == answer


@given(st.text(alphabet="ABCDEZ .()*:\n\\{}answeris", max_size=60), st.integers(2, 5))
def test_an_answer_is_always_one_of_the_letters(text, n):
    assert grade("choice", text, n) in {None, *"ABCDE"[:n]}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 - 4 = 9, and 9 * 2 = $18.", "18"),
        ("She makes $1,450,000.00", "1450000"),
        ("#### 18\nThat took 2 steps.", "18"),
        ("#### Step 1\n3 apples\n#### 7 apples in 2 bags", "7"),
        ("5-3", "3"),
        ("it is -3.50 degrees", "-3.5"),
        ("a loss of -$20", "-20"),
        ("between 1,2 and 3", "3"),
        ("20% of CO2", "20"),
        ("no idea", None),
    ],
)
def test_numbers(text, number):
    assert grade("number", text) == number


@given(st.integers(-(10**30), 10**30))
def test_a_number_is_the_same_in_every_spelling(value):
    spellings = (f"{value}", f"{value:,}", f"{value}.0", f"{value:,}.00", f"{value}.")
    assert {canonical_number(s) for s in spellings} == {str(value)}
    assert {grade("number", f"It is {s}") for s in spellings} == {str(value)}
    assert grade("number", f"#### {value:,} in total, of 7") == str(value)


@pytest.mark.parametrize("text", ["", "A", "12 apples", "1/2", "3-4", "1e5"])
def test_a_gold_number_is_one_number_and_nothing_else(text):
    assert canonical_number(text) is None
