"""What a refused command looks like."""


def refused(result, *words):
    """Exit code 2, and the last two lines say what is wrong and what to type."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: "), err
    assert hint.startswith("  "), err
    for word in words:
        assert word in error, err
    return hint
